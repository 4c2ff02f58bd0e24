"""Text up to the stop texts, against looking at the whole text after every token."""

import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from maxlike.engine.detokenizer import Detokenizer
from maxlike.engine.sampling_params import SamplingParams
from maxlike.models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_fallback, byte_level

WORDS = ["a", "b", "ab", "ba", "aab", "abab", "bbb", "Ã", "©", "Ã©a", "bÃ", "©©", "c"]
"""As byte-level BPE spells them: two of the tokens are one byte each of é, others end or begin inside it."""


def small() -> Tokenizer:
    inner = tokenizers.Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(WORDS)}, merges=[]))
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(["<end>"])
    return Tokenizer(inner)


TOKENIZER, BYTE_LEVEL = small(), Tokenizer(byte_level())
END = len(WORDS)
TEXTS = st.text("abé\ufffd", min_size=1, max_size=5)


def expected(ids, stops, include, min_tokens, flush=True):
    """All text that may be out after `ids`, and what stopped it."""
    stream, text, n_blind = TOKENIZER.stream(ignore_unknown=True), "", 0
    for n, id in enumerate(ids, 1):
        text += stream.push(id)
        n_blind = len(text) if n <= min_tokens else n_blind
    text += stream.flush() if flush else ""
    if len(ids) < min_tokens:
        n_blind = len(text)
    for end in range(n_blind + 1, len(text) + 1):
        if found := [stop for stop in stops if text[:end].endswith(stop)]:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    begun = 0 if flush else max(n for stop in stops for n in range(len(stop)) if text.endswith(stop[:n]))
    return text[: len(text) - begun], None


@settings(max_examples=1500, deadline=None)
@given(
    ids=st.lists(st.integers(0, END + 3), max_size=12),
    stops=st.lists(TEXTS, min_size=1, max_size=4),
    include=st.booleans(),
    min_tokens=st.integers(0, 4),
)
@example([0, 2, 1], ["abb", "bab"], False, 0)
@example([2, 2, 2], ["abab", "b"], False, 2)
@example([3, 3, 12], ["ab", "abac"], False, 1)
@example([5, 5], ["ba"], True, 1)
@example([7, 8, 7], ["é\ufffd"], False, 0)
def test_stop_texts(ids, stops, include, min_tokens):
    params = SamplingParams(stop=stops, include_stop_str_in_output=include, min_tokens=min_tokens, max_tokens=99)
    detokenizer, text = Detokenizer(TOKENIZER, params), ""
    for n, id in enumerate(ids, 1):
        text += detokenizer.push(id)
        assert (text, detokenizer.stopped_by) == expected(ids[:n], stops, include, min_tokens, flush=False)
    text += detokenizer.flush()
    assert (text, detokenizer.stopped_by) == expected(ids, stops, include, min_tokens)
    assert detokenizer.flush() == ""


@settings(max_examples=300, deadline=None)
@given(text=st.text("abé \n", max_size=20), stop=st.lists(TEXTS, max_size=3), cuts=st.randoms())
def test_it_does_not_matter_how_text_is_cut_into_tokens(text, stop, cuts):
    def run(max_length):
        tokenizer, ids, rest = BYTE_LEVEL, [], text
        while rest:
            length = cuts.randint(1, max_length)
            ids += tokenizer.encode(rest[:length], add_special_tokens=False)
            rest = rest[length:]
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop))
        return "".join([*map(detokenizer.push, ids), detokenizer.flush()]), detokenizer.stopped_by

    assert run(1) == run(20)


def test_without_stop_texts_it_is_the_stream():
    tokenizer = Tokenizer(byte_level())
    ids = [*tokenizer.encode("naïve 👩‍👩‍👧‍👦 한글</s> the end"), tokenizer.vocab_size + 7]
    for skip in (True, False):
        detokenizer = Detokenizer(tokenizer, SamplingParams(skip_special_tokens=skip))
        pieces = [*map(detokenizer.push, ids), detokenizer.flush()]
        assert "".join(pieces) == tokenizer.decode(ids[:-1], skip_special_tokens=skip)
        assert not any("\ufffd" in piece for piece in pieces) and detokenizer.stopped_by is None
        assert not hasattr(detokenizer, "_stops")


def test_the_space_between_prompt_and_output_is_kept():
    tokenizer = Tokenizer(byte_fallback())
    ids = tokenizer.encode("the wall", add_special_tokens=False)
    for stop, expected in (((), " the wall"), (("wall",), " the "), (("the",), " "), ((" t",), "")):
        detokenizer = Detokenizer(tokenizer, SamplingParams(stop=stop), after=tokenizer.encode("hello"))
        assert "".join([*map(detokenizer.push, ids), detokenizer.flush()]) == expected


def test_a_long_stop_text_takes_linear_time():
    stop = "a" * 30_000 + "b"
    detokenizer = Detokenizer(TOKENIZER, SamplingParams(stop=[stop, stop[1:]]))
    text = "".join(detokenizer.push(0) for _ in range(40_000))
    assert text == "a" * 10_000 and detokenizer.stopped_by is None
    assert detokenizer.push(1) == "" and detokenizer.stopped_by == stop
    assert detokenizer.flush() == detokenizer.push(0) == ""
