"""Streamed text equals the text of all tokens decoded at once, has whole characters only, and ends at stop strings."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from hetis.core.sampling_params import SamplingParams
from hetis.frontend.detokenizer import Detokenizer, StopChecker
from tests.byte_level import train_byte_level

CORPUS = [
    "The quick brown fox jumps over the lazy dog. Every good boy deserves fudge, said the fox.",
    "Ünïcödé tèxt, naïve café, Straße; 日本語のテキスト、中文字符。한국어 문장입니다.",
    "👩‍👩‍👧 families 🏳️‍🌈 and 👍🏽 thumbs, e\u0301 combining, क्षत्रिय, العربية, עברית",
] * 4
SPECIAL = ["<s>", "</s>"]
TEXT = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"], exclude_characters="\ufffd"),
        st.sampled_from("ab .é日本語한👩‍👧🏳️‍🌈👍🏽e\u0301क्ष▁"),
    ),
    max_size=40,
)


def byte_level(use_regex: bool) -> Tokenizer:
    """A tokenizer like GPT-2's; without the regex, tokens may join the end of a character and the next one's start."""
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return train_byte_level(CORPUS, 500, SPECIAL, words)


def byte_fallback() -> Tokenizer:
    """A tokenizer like Llama-2's: words begin with a visible space, rare characters are encoded as bytes."""
    pieces = ["<unk>", *[f"<0x{byte:02X}>" for byte in range(256)], "▁", *"abcdefghijklmnopqrstuvwxyz.,é日"]
    pieces += ["▁a", "th", "the", "▁the", "▁b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "b")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


TOKENIZERS = {"regex": byte_level(True), "joined": byte_level(False), "byte_fallback": byte_fallback()}
BYTE_LEVEL = TOKENIZERS["regex"]
tokenizers = pytest.mark.parametrize("name", TOKENIZERS)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


def pieces_of(detokenizer: Detokenizer, ids: list[int]) -> list[str]:
    pieces = [detokenizer.append([token])[0] for token in ids]
    return [*pieces, detokenizer.finish()]


@tokenizers
@given(text=TEXT)
@settings(max_examples=150)
def test_pieces_are_whole_characters_and_add_up(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)
    detokenizer = Detokenizer(tokenizer, SamplingParams())
    pieces = pieces_of(detokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids) == detokenizer.text
    assert not any("\ufffd" in piece for piece in pieces)


@tokenizers
@given(text=TEXT, data=st.data())
@settings(max_examples=100)
def test_output_continues_the_prompt(name: str, text: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = ids_of(tokenizer, text)
    cut = data.draw(st.integers(0, len(ids)))
    prompt_ids = ids[:cut]
    while name == "byte_fallback" and tokenizer.decode(prompt_ids).endswith("\ufffd"):  # it decodes whole words
        prompt_ids.pop()
    prompt_text = tokenizer.decode(prompt_ids).rstrip("\ufffd")
    if not tokenizer.decode(ids).startswith(prompt_text):
        return  # this decoder reads bytes differently when more follow: there is nothing to compare with
    detokenizer = Detokenizer(tokenizer, SamplingParams(), ids[:cut])
    assert prompt_text + "".join(pieces_of(detokenizer, ids[cut:])) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["regex", "joined"])
@given(data=st.data())
@settings(max_examples=200)
def test_any_tokens_give_the_text_of_all_without_an_unfinished_character(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(2, tokenizer.get_vocab_size() - 1), max_size=60))
    text = "".join(pieces_of(Detokenizer(tokenizer, SamplingParams()), ids))
    whole = tokenizer.decode(ids)
    closed = tokenizer.decode([*ids, tokenizer.token_to_id("a")])  # so that the last character stays unfinished
    assert closed == whole + "a", "an a does not complete a character"
    assert text == whole or text + "\ufffd" == whole


@tokenizers
@given(text=TEXT, count=st.integers(1, 5), cut=st.integers(0, 3))
@settings(max_examples=100)
def test_a_replacement_character_of_the_text_is_kept(name: str, text: str, count: int, cut: int) -> None:
    """At the end of the output, before an unfinished character, and at the end of the prompt."""
    tokenizer = TOKENIZERS[name]
    written = text + "\ufffd" * count
    whole, cut_off, followed = (ids_of(tokenizer, written + end) for end in ("", "\U0001f9ff", "a"))
    if tokenizer.decode(whole) != written or cut_off[: len(whole)] != whole or followed[: len(whole)] != whole:
        return  # text that this tokenizer does not reproduce, or tokens that depend on what follows
    for ids in (whole, cut_off[:-1][: len(whole) + cut]):
        assert "".join(pieces_of(Detokenizer(tokenizer, SamplingParams()), ids)) == written
    assert "".join(pieces_of(Detokenizer(tokenizer, SamplingParams(), whole), followed[len(whole) :])) == "a"


def test_text_cut_within_a_character_ends_before_it() -> None:
    ids = ids_of(BYTE_LEVEL, "ok 👩")
    pieces = pieces_of(Detokenizer(BYTE_LEVEL, SamplingParams()), ids[:-1])
    assert "".join(pieces) == "ok "


@tokenizers
def test_a_run_of_invalid_bytes_does_not_grow_the_window(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    lone = tokenizer.token_to_id("<0xFF>" if name == "byte_fallback" else "ÿ")
    decoded = []

    class Counting:
        def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
            decoded.append(len(ids))
            return tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

        def __getattr__(self, attribute: str) -> object:
            return getattr(tokenizer, attribute)

    detokenizer = Detokenizer(Counting(), SamplingParams())
    pieces_of(detokenizer, [lone] * 500)
    assert max(decoded) < 20
    assert detokenizer.text == "\ufffd" * len(detokenizer.text)


@pytest.mark.parametrize(
    ("skip", "text"), [(True, "a b"), (False, "<s>a</s> b")], ids=["special tokens left out", "special tokens shown"]
)
@tokenizers
def test_special_tokens(name: str, skip: bool, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    first, second = (ids_of(tokenizer, "a"), ids_of(tokenizer, "a b")[1:])
    ids = [tokenizer.token_to_id("<s>"), *first, tokenizer.token_to_id("</s>"), *second]
    detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
    assert "".join(pieces_of(detokenizer, ids)).replace("<s> a", "<s>a") == text
    assert detokenizer.text == tokenizer.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize(("spaces", "text"), [(True, "a <s> </s> b"), (False, "a <s></s> b")])
def test_spaces_between_special_tokens(spaces: bool, text: str) -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))  # no decoder: a space between any two
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    params = SamplingParams(skip_special_tokens=False, spaces_between_special_tokens=spaces)
    detokenizer = Detokenizer(tokenizer, params)
    assert "".join(pieces_of(detokenizer, [0, 2, 3, 1])) == text


def test_ids_without_a_token_have_no_text() -> None:
    ids = ids_of(BYTE_LEVEL, "fox dog")
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams())
    assert "".join(pieces_of(detokenizer, [ids[0], 70_000, *ids[1:], 70_001])) == "fox dog"


def first_end(text: str, stops: list[str], after: int = 0) -> tuple[int, str] | None:
    """Naive search: the first end of a match beyond `after` characters, and the longest match that ends there."""
    for end in range(after + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return end, max(found, key=len)
    return None


STOPS = st.lists(st.text("ab\n👍", min_size=1, max_size=4), min_size=1, max_size=8)


@given(text=st.text("ab\n👍", max_size=30), stops=STOPS, include=st.booleans(), least=st.integers(0, 6))
@settings(max_examples=300)
def test_stop_strings_are_found_as_by_naive_search(text: str, stops: list[str], include: bool, least: int) -> None:
    ids = ids_of(BYTE_LEVEL, text)
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=least)
    detokenizer = Detokenizer(BYTE_LEVEL, params)
    pieces, stop = [], None
    for token in ids:
        piece, stop = detokenizer.append([token])
        pieces.append(piece)
        if stop is not None:
            break
    pieces.append(detokenizer.finish())
    expected = first_end(text, stops, after=len(BYTE_LEVEL.decode(ids[:least]).rstrip("\ufffd")))
    if expected is None:
        assert (stop, "".join(pieces)) == (None, text)
    else:
        end, found = expected
        assert stop == found
        assert "".join(pieces) == detokenizer.text == text[: end if include else end - len(found)]
        shortest = next(n for n in range(len(ids) + 1) if len(BYTE_LEVEL.decode(ids[:n]).rstrip("\ufffd")) >= end)
        assert detokenizer.num_tokens == shortest


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=12))
@settings(max_examples=200)
def test_only_prefixes_of_stop_strings_are_held(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    for length in range(1, len(text) + 1):
        checker.feed(text[length - 1 : length], counts=False)
        prefixes = {stop[:n] for stop in stops for n in range(1, len(stop))}
        held = max((len(prefix) for prefix in prefixes if text[:length].endswith(prefix)), default=0)
        assert checker.longest_prefix() == held


def test_tokens_after_a_stop_string_are_ignored() -> None:
    ids = ids_of(BYTE_LEVEL, "one two three")
    detokenizer = Detokenizer(BYTE_LEVEL, SamplingParams(stop="two"))
    assert detokenizer.append(ids) == ("one ", "two")
    assert detokenizer.num_tokens < len(ids)
    assert detokenizer.finish() == ""


@pytest.mark.parametrize(("include", "text"), [(False, "fox"), (True, "fox</s>")])
def test_the_token_that_ends_a_sequence_is_hidden(include: bool, text: str) -> None:
    params = SamplingParams(skip_special_tokens=False, include_stop_str_in_output=include)
    detokenizer = Detokenizer(BYTE_LEVEL, params)
    detokenizer.append(ids_of(BYTE_LEVEL, "fox"))
    detokenizer.append([BYTE_LEVEL.token_to_id("</s>")], hide=True)
    detokenizer.finish()
    assert detokenizer.text == text


def test_tokenizers_of_transformers_are_unwrapped() -> None:
    from transformers import PreTrainedTokenizerFast

    wrapped = PreTrainedTokenizerFast(tokenizer_object=BYTE_LEVEL, eos_token="</s>")
    text = "Straße 日本語 👩‍👩‍👧"
    detokenizer = Detokenizer(wrapped, SamplingParams())
    assert "".join(pieces_of(detokenizer, wrapped.encode(text, add_special_tokens=False))) == text
