"""Text from tokens as they come: whole characters only, and nothing that may turn out to be part of a stop string."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from hetis.core.sampling_params import SamplingParams

_UNFINISHED = "\ufffd"  # what decoders make of bytes that are no character (yet)
_PROMPT_TOKENS = 6  # of the prompt's end, decoded with the first token so that it gets its space
_MOST_PENDING = 8  # tokens; a character has at most 4 bytes, so after these the bytes are no text
_LAST_TOKENS = 4  # at least the bytes of the last character


class Detokenizer:
    """The text of one sequence, given out piece by piece."""

    def __init__(self, tokenizer: Any, params: SamplingParams, prompt_token_ids: Sequence[int] = ()) -> None:
        """`tokenizer`: `tokenizers.Tokenizer`, or a fast tokenizer of transformers. The prompt decides how the output
        begins (with some tokenizers, whether a word at its start has a space before it); it is not part of the text."""
        self.text = ""  # given out so far
        self.num_tokens = 0
        self._params = params
        self._decoder = _TokenDecoder(tokenizer, params)
        self._decoder.prime(prompt_token_ids)
        self._checker = StopChecker(params.stop)
        self._held = ""  # decoded, but perhaps the begin of a stop string
        self._stopped = False

    def append(self, token_ids: Iterable[int], hide: bool = False) -> tuple[str, str | None]:
        """Text that is certain now, and the stop string that ended it, if any; then the tokens after it are ignored.

        `hide`: these tokens end the sequence (end of sequence or stop token), and show only with
        `include_stop_str_in_output`. A stop string counts when it ends after the first `min_tokens` tokens.
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
        """The text still held back, when the sequence ends. Bytes that never became a character are dropped."""
        piece, stop = self._advance(self._decoder.flush())
        if stop is None:
            piece += self._give_out(len(self._held))
        return piece

    def _advance(self, new: str) -> tuple[str, str | None]:
        if self._stopped or not new:
            return "", None
        held = self._held + new
        found = self._checker.feed(new, counts=self.num_tokens > self._params.min_tokens)
        self._held = held
        if found is None:
            hold = 0 if self._params.include_stop_str_in_output else self._checker.longest_begin()
            return self._give_out(len(held) - hold), None
        stop, end = found
        end += len(held) - len(new)
        self._stopped = True
        piece = self._give_out(end if self._params.include_stop_str_in_output else end - len(stop))
        self._held = ""
        return piece, stop

    def _give_out(self, length: int) -> str:
        piece, self._held = self._held[:length], self._held[length:]
        self.text += piece
        return piece


class StopChecker:
    """Finds stop strings in text that comes in pieces.

    The match that ends first counts, and of those that end together the longest: whatever the pieces are. The text goes
    through once, character by character, with one state per stop string (Knuth, Morris and Pratt 1977).
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._borders = [_borders(stop) for stop in stops]
        self._matched = [0] * len(stops)  # characters of each stop string that the text ends with

    def feed(self, new: str, counts: bool = True) -> tuple[str, int] | None:
        """The stop string that is complete first, and where in `new` it ends. Unless it `counts`, it is passed over."""
        for end, character in enumerate(new, start=1) if self._stops else ():
            found = [stop for index, stop in enumerate(self._stops) if self._step(index, character)]
            if found and counts:
                return max(found, key=len), end
        return None

    def _step(self, index: int, character: str) -> bool:
        stop, borders, matched = self._stops[index], self._borders[index], self._matched[index]
        while matched and (matched == len(stop) or stop[matched] != character):
            matched = borders[matched - 1]
        self._matched[index] = matched + (stop[matched] == character)
        return self._matched[index] == len(stop)

    def longest_begin(self) -> int:
        """Characters at the end of the text that may become a stop string: the longest proper begin of any of them."""
        return max(
            (
                borders[-1] if matched == len(stop) else matched
                for stop, borders, matched in zip(self._stops, self._borders, self._matched, strict=True)
            ),
            default=0,
        )


def _borders(stop: str) -> list[int]:
    """For each begin of `stop`, the length of its longest proper begin that is also its end."""
    borders = [0] * len(stop)
    length = 0
    for position in range(1, len(stop)):
        while length and stop[position] != stop[length]:
            length = borders[length - 1]
        length += stop[position] == stop[length]
        borders[position] = length
    return borders


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: Any) -> dict[int, str]:
    """Text of the special tokens by id. Cached, as some models have thousands."""
    return {token: added.content for token, added in tokenizer.get_added_tokens_decoder().items() if added.special}


class _TokenDecoder:
    """Tokens to text, one at a time.

    Decoding a token alone loses what depends on those before it (a space, the first bytes of a character). So a short
    window of tokens is decoded, of which `shown` characters have been given out:

        ids:   ... | tokens of the last text | tokens without whole text yet
                   ^ window                  ^ fresh
    """

    def __init__(self, tokenizer: Any, params: SamplingParams) -> None:
        self._tokenizer = getattr(tokenizer, "backend_tokenizer", tokenizer)
        self._skip_special = params.skip_special_tokens
        self._special = _special_tokens(self._tokenizer)
        # some decoders put a space between any two tokens, special ones included
        self._joins_special = not (params.skip_special_tokens or params.spaces_between_special_tokens)
        self._window: list[int] = []
        self._fresh = 0  # index in the window
        self._shown = 0

    def prime(self, prompt_token_ids: Sequence[int]) -> None:
        """The tokens before the first. If they end within a character, it will be given out with the output."""
        end = [token for token in prompt_token_ids[-4 * _PROMPT_TOKENS :] if self._has_text(token)]
        self._window = end[-_PROMPT_TOKENS:]
        if self._decode(self._window).startswith(_UNFINISHED):  # cut within a character
            self._window = end
        self._shown = len(self._decode(self._window).rstrip(_UNFINISHED))
        self._fresh = len(self._window)
        while self._fresh and self._decode(self._window[: self._fresh]).endswith(_UNFINISHED):
            self._fresh -= 1

    def push(self, token: int) -> str:
        """The whole characters that this token completes."""
        if not self._has_text(token):
            return ""
        if self._joins_special and token in self._special and self._window and self._window[-1] in self._special:
            self._slide([*self._window, token], len(self._window))
            return self._special[token]
        self._window.append(token)
        text = self._decode(self._window)
        pending = len(self._window) - self._fresh
        if not text.endswith(_UNFINISHED):
            whole = text
        elif pending <= _MOST_PENDING:
            whole = text.rstrip(_UNFINISHED)
        else:
            whole = text[:-1]  # what is in front of the last character can no longer change
        piece = whole[self._shown :]
        if piece and whole == text:
            self._slide(self._window, self._fresh)
        elif pending > _MOST_PENDING:
            self._slide(self._window, len(self._window) - _LAST_TOKENS)
            self._shown -= len(text) - len(whole)
        else:
            self._shown = max(self._shown, len(whole))
        return piece

    def flush(self) -> str:
        """The text of pending tokens without their incomplete end."""
        piece = self._decode(self._window).rstrip(_UNFINISHED)[self._shown :]
        self._window, self._fresh, self._shown = [], 0, 0
        return piece

    def _slide(self, ids: list[int], first: int) -> None:
        """The window begins at `first`; all its text has been given out."""
        self._window = ids[first:]
        self._fresh = len(self._window)
        self._shown = len(self._decode(self._window))

    def _has_text(self, token: int) -> bool:
        if token in self._special:
            return not self._skip_special
        return self._tokenizer.id_to_token(token) is not None

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text
