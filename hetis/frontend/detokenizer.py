"""Incremental detokenisation: emits whole characters only, and nothing that may become part of a stop string."""

import codecs
import json
import re
from collections import deque
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from hetis.core.sampling_params import SamplingParams

_UNFINISHED = "\ufffd"  # decoders replace bytes that are not (yet) a character by this
_PROMPT_TOKENS = 6  # last tokens of the prompt, decoded with the first output token so that it gets its space
_MOST_PENDING = 8  # tokens in a row that end within a character
_LAST_TOKENS = 4  # a character has at most four bytes, so these hold the last one
_MOST_CACHED = 1 << 16  # tokens
_CONTINUATION = {bytes([byte]) for byte in range(0x80, 0xC0)}  # bytes of a character after its first
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Detokenizer:
    """The text of one sequence, emitted in pieces."""

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer`, or a fast tokenizer of transformers. `prompt_token_ids`: context, not
        part of the text; with some tokenizers it decides whether the first word has a space."""
        self.text = ""  # emitted so far
        self.num_tokens = 0
        self._params = params
        self._decoder = _TokenDecoder(tokenizer, params)
        self._decoder.prime(prompt_token_ids)
        self._checker = StopChecker(params.stop)
        self._held = ""  # decoded, but perhaps the prefix of a stop string
        self._stopped = False

    def append(self, token_ids: Iterable[int], hide: bool = False) -> tuple[str, str | None]:
        """Appends tokens; returns the text that is certain now, and the stop string that ended it or None.

        `hide`: the tokens end the sequence (end of sequence or stop token), and are shown only with
        `include_stop_str_in_output`. A stop string is effective if it ends after the first `min_tokens` tokens; tokens
        after it are ignored.
        """
        assert not self._stopped, "nothing can follow a stop string"
        piece = ""
        for token in token_ids:
            self.num_tokens += 1
            if hide and not self._params.include_stop_str_in_output:
                continue
            new, stop = self._advance(self._decoder.push(token))
            piece += new
            if stop is not None:
                return piece, stop
        return piece, None

    def finish(self) -> str:
        """Ends the sequence; returns the text held back. Bytes that are not a whole character are dropped."""
        piece, stop = self._advance(self._decoder.flush())
        if stop is None:
            piece += self._emit(len(self._held))
        return piece

    def _advance(self, new: str) -> tuple[str, str | None]:
        if not self._params.stop:
            self.text += new
            return new, None
        if self._stopped or not new:
            return "", None
        held = self._held + new
        found = self._checker.feed(new, counts=self.num_tokens > self._params.min_tokens)
        self._held = held
        if found is None:
            hold = 0 if self._params.include_stop_str_in_output else self._checker.longest_prefix()
            return self._emit(len(held) - hold), None
        stop, end = found
        end += len(held) - len(new)
        self._stopped = True
        piece = self._emit(end if self._params.include_stop_str_in_output else end - len(stop))
        self._held = ""
        return piece, stop

    def _emit(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        return piece


class StopChecker:
    """Finds stop strings in text that arrives in pieces.

    Reports the match that ends first and, of matches that end together, the longest, independent of the pieces. Reads
    each character once, with one state for all stop strings (Aho and Corasick 1975).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._state = _automaton(tuple(stops))

    def feed(self, new: str, counts: bool = True) -> tuple[str, int] | None:
        """The stop string that is complete first, and its end in `new`. Ignores all of them unless `counts`."""
        for end, character in enumerate(new, start=1):
            self._state = self._state.step(character)
            if counts and self._state.stop is not None:
                return self._state.stop, end
        return None

    def longest_prefix(self) -> int:
        """Length of the text's end that may become a stop string: the longest proper prefix of any of them."""
        state = self._state
        while not state.following and state.shorter is not None:
            state = state.shorter
        return state.depth


class _State:
    """A node of the automaton: the longest prefix of a stop string that the text ends with."""

    __slots__ = ("depth", "following", "shorter", "stop")

    def __init__(self, depth: int = 0) -> None:
        self.depth = depth
        self.following: dict[str, _State] = {}
        self.shorter: _State | None = None  # the next longest such prefix; None: this one is empty
        self.stop: str | None = None  # the longest stop string that the text ends with

    def step(self, character: str) -> "_State":
        state = self
        while character not in state.following:
            if state.shorter is None:
                return state
            state = state.shorter
        return state.following[character]


@lru_cache(maxsize=64)
def _automaton(stops: tuple[str, ...]) -> _State:
    """The state of the empty text. It is immutable, so completions share it."""
    root = _State()
    for stop in stops:
        state = root
        for character in stop:
            state = state.following.setdefault(character, _State(state.depth + 1))
        state.stop = stop
    states = deque([root])
    while states:  # shorter prefixes first
        state = states.popleft()
        for character, following in state.following.items():
            following.shorter = root if state.shorter is None else state.shorter.step(character)
            following.stop = following.stop or following.shorter.stop
            states.append(following)
    return root


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Text of the special tokens by id. Cached, since some models have thousands."""
    return {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}


@lru_cache(maxsize=1)
def _bytes_of_characters() -> dict[str, int]:
    """The byte for each character of a byte-level token (GPT-2's table): printable characters of Latin-1 stand for
    themselves, characters from U+0100 on for the other bytes in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


class _TokenBytes:
    """Bytes and texts of single tokens. Tokenizers that are byte-level or have byte fallback may cut characters."""

    def __init__(self, tokenizer: Any) -> None:
        kind = b"{}" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
        self._tokenizer = tokenizer
        self._is_byte_level, self._has_fallback = b'"ByteLevel"' in kind, b'"ByteFallback"' in kind
        self._is_context_free = json.loads(kind).get("type") == "ByteLevel"  # the text is that of all bytes in order
        # called for every token of every output
        self.has_text = lru_cache(_MOST_CACHED)(lambda token: tokenizer.id_to_token(token) is not None)
        self.alone = lru_cache(_MOST_CACHED)(lambda token: str(tokenizer.decode([token], skip_special_tokens=False)))
        self.whole = lru_cache(_MOST_CACHED)(self._whole)

    def _whole(self, token: int) -> str | None:
        """The text of a token that has whole characters, after any whole characters; None if it depends on others."""
        if not self._is_context_free:
            return None
        try:
            return self.of(token).decode()
        except UnicodeDecodeError:
            return None

    def unfinished(self, ids: Sequence[int]) -> int:
        """Number of bytes at the end that begin a character without completing it."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        decoder.decode(b"".join(self.of(token) for token in ids))
        return len(decoder.getstate()[0])

    def continues(self, token: int) -> bool:
        """Whether the token begins within a character."""
        return self.of(token)[:1] in _CONTINUATION

    def of(self, token: int) -> bytes:
        text: str = self._tokenizer.id_to_token(token)
        if self._is_byte_level:
            table = _bytes_of_characters()
            if all(character in table for character in text):
                return bytes(table[character] for character in text)
        if self._has_fallback and _BYTE_TOKEN.fullmatch(text):
            return bytes([int(text[3:5], 16)])
        return text.encode()


@lru_cache(maxsize=4)
def _token_bytes(tokenizer: Any) -> _TokenBytes:
    return _TokenBytes(tokenizer)


class _TokenDecoder:
    """Decodes tokens one at a time.

    The text of a token may depend on those before it (a space, the first bytes of a character), so a short window of
    tokens is decoded, of which `shown` characters have been emitted:

        ids:   ... | tokens of the last text | tokens without whole characters yet
                   ^ window                  ^ fresh

    Most tokens of a byte-level tokenizer need no decoding: they have whole characters and follow whole characters.
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._skip_special = params.skip_special_tokens
        self._special = _special_tokens(self._tokenizer)
        # some decoders put a space between any two tokens, special ones included
        self._joins_special = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._bytes = _token_bytes(self._tokenizer)
        self._window: list[int] = []
        self._fresh = 0  # index in the window
        self._shown = 0
        self._ends_whole = True  # the window's text ends with a whole character

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        """Sets the prompt. If it ends within a character, that character is emitted with the output."""
        end = [token for token in prompt_token_ids[-4 * _PROMPT_TOKENS :] if self._has_text(token)]
        first = max(0, len(end) - _PROMPT_TOKENS)
        while first and self._bytes.continues(end[first]):  # cut within a character
            first -= 1
        self._window = end[first:]
        self._shown = len(self._whole(self._window, self._decode(self._window)))
        self._fresh = len(self._window)
        self._ends_whole = not self._bytes.unfinished(self._window)
        while self._fresh and self._bytes.unfinished(self._window[: self._fresh]):
            self._fresh -= 1

    def push(self, token: int) -> str:
        """Appends a token; returns the whole characters that it completes."""
        if not self._has_text(token):
            return ""
        if self._ends_whole and (alone := self._bytes.whole(token)) is not None:
            self._window, self._fresh, self._shown = [token], 1, len(alone)
            return alone
        if self._joins_special and token in self._special and self._window and self._window[-1] in self._special:
            self._slide([*self._window, token], len(self._window))
            return self._special[token]
        self._window.append(token)
        text = self._decode(self._window)
        whole = self._whole(self._window, text)
        self._ends_whole = whole == text
        piece = whole[self._shown :]
        if piece and whole == text:
            self._slide(self._window, self._fresh)
        elif len(self._window) - self._fresh > _MOST_PENDING:
            self._slide(self._window, len(self._window) - _LAST_TOKENS)
        else:
            self._shown = max(self._shown, len(whole))
        return piece

    def flush(self) -> str:
        """Empties the window; returns the text of pending tokens without an incomplete character at the end."""
        piece = self._whole(self._window, self._decode(self._window))[self._shown :]
        self._window, self._fresh, self._shown = [], 0, 0
        return piece

    def _slide(self, ids: list[int], first: int) -> None:
        """Moves the window to `ids[first:]`, all of whose whole characters have been emitted."""
        self._window = ids[first:]
        self._fresh = len(self._window)
        self._shown = len(self._whole(self._window, self._decode(self._window)))

    def _whole(self, ids: list[int], text: str) -> str:
        """`text`, decoded from `ids`, without an incomplete character at its end. (U+FFFD may be real output.)"""
        left = self._bytes.unfinished(ids) if text.endswith(_UNFINISHED) else 0
        if not left:
            return text
        while left and (size := len(self._bytes.of(ids[-1]))) <= left:
            ids, left = ids[:-1], left - size
        text = self._decode(ids)
        return text[:-1] if left else text  # a token that ends one character and begins another

    def _has_text(self, token: int) -> bool:
        if token in self._special:
            return not self._skip_special
        return self._bytes.has_text(token)

    def _decode(self, ids: list[int]) -> str:
        if len(ids) == 1:
            return self._bytes.alone(ids[0])
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text


def token_bytes(tokenizer: Any, token_id: int) -> bytes:
    """Bytes of one token, also of one that ends within a character. `tokenizer`: as of `Detokenizer`."""
    return _token_bytes(getattr(tokenizer, "backend_tokenizer", tokenizer)).of(token_id)
