"""Streams of text against decoding at once, over random ids of every kind of tokenizer."""

import itertools
import json
import threading

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from maxlike.models.tokenizer import Tokenizer
from tests.models.test_tokenizer import byte_fallback, byte_level, unigram

ADDED = ["<think>", "<a b>", "é…", " x", "<0x41>", "▁y", "\n\n", "👩‍👩‍👧"]
"""Added words that are not special, some of them hard on a decoder."""


def changed(tokenizer, decoder):
    tokenizer.decoder = decoder
    return tokenizer


def word_pieces():
    vocab = ["[UNK]", "<s>", "</s>", "<pad>", "the", "wor", "##ld", "##s", "!", ",", "é", "##é"]
    tokenizer = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocab)}, unk_token="[UNK]"))
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>"])
    return changed(tokenizer, decoders.WordPiece(cleanup=False))


REPLACE, BYTES, FUSE = decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()
KINDS = {
    # by table
    "byte level": byte_level,
    "Llama 2": byte_fallback,
    "Gemma": lambda: changed(byte_fallback(), decoders.Sequence([REPLACE, BYTES, FUSE])),
    "unfused": lambda: changed(byte_fallback(), decoders.Sequence([REPLACE, BYTES])),
    "metaspace": unigram,
    "metaspace, never": lambda: changed(unigram(), decoders.Metaspace(prepend_scheme="never")),
    "metaspace, in a sequence": lambda: changed(unigram(), decoders.Sequence([decoders.Metaspace()])),
    # by window
    "byte level, fused": lambda: changed(byte_level(), decoders.Sequence([decoders.ByteLevel(), FUSE])),
    "word pieces": word_pieces,
    "no decoder": lambda: changed(unigram(), None),
}
OF_BYTES = ("Llama 2", "Gemma", "unfused")


def with_added(tokenizer):
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    tokenizer.add_special_tokens(["<|eot|>"])
    return Tokenizer(tokenizer)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param, with_added(KINDS[request.param]())


def joined(stream, ids):
    return "".join([*map(stream.push, ids), stream.flush()])


def bytes_in(tokenizer, id):
    """The byte that a byte-fallback token stands for, or None."""
    token = tokenizer._tokenizer.id_to_token(id)
    return int(token[3:5], 16) if token.startswith("<0x") and len(token) == 6 else None


def as_far_as_text(tokenizer, ids):
    """What decode() says, but for runs of bytes that are not UTF-8: those keep the characters that they begin with."""
    expected, decode = "", tokenizer._tokenizer.decode
    for are_bytes, run in itertools.groupby(ids, lambda id: bytes_in(tokenizer, id) is not None):
        run = list(run)
        if not are_bytes:
            expected += decode([5, *run], skip_special_tokens=False)[len(decode([5])) :]
            continue
        raw = bytes(bytes_in(tokenizer, id) for id in run)
        text = raw.decode(errors="surrogateescape")
        good = "".join(itertools.takewhile(lambda c: not 0xDC80 <= ord(c) <= 0xDCFF, text))
        expected += good + "\ufffd" * (len(raw) - len(good.encode()))
    return expected


def draw_ids(data, tokenizer):
    """Few ids, or those of one hard text or another with anything between."""
    any_id = st.integers(0, tokenizer.vocab_size - 1)
    few = data.draw(st.lists(any_id, min_size=1, max_size=5))
    text = st.text("a é€ꙮ😀👩‍👩‍👧한글\u1112\u1161\u11ab\u0301\ufffd\x00\n▁", max_size=12)
    encoded = text.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    special = st.lists(st.sampled_from(sorted(tokenizer.special_ids)), max_size=2)
    parts = st.one_of(st.lists(st.sampled_from(few), max_size=6), st.lists(any_id, max_size=6), encoded, special)
    return [id for part in data.draw(st.lists(parts, max_size=6)) for id in part]


@settings(max_examples=300, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_any_ids_at_all(kind, data, skip):
    name, tokenizer = kind
    ids = draw_ids(data, tokenizer)
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    stream = tokenizer.stream(skip_special_tokens=skip)
    if name in OF_BYTES:
        seen = [id for id in ids if not (skip and id in tokenizer.special_ids)]
        careful = as_far_as_text(tokenizer, seen)
        if name == "Llama 2":
            careful = careful.removeprefix(" ")
        assert len(careful) <= len(expected)
        if "\ufffd" not in careful:
            assert careful == expected  # so is this test's own reference
        expected = careful
    assert joined(stream, ids) == expected
    assert joined(stream, ids) == expected  # a flushed stream begins anew


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_no_piece_ends_inside_a_character(kind, data, skip):
    _, tokenizer = kind
    text = data.draw(st.text(max_size=20).filter(lambda text: "\ufffd" not in text))
    ids = tokenizer.encode(text, add_special_tokens=False)
    stream = tokenizer.stream(skip_special_tokens=skip)
    expected, so_far = tokenizer.decode(ids, skip_special_tokens=skip), ""
    for id in ids:
        so_far += stream.push(id)
        assert expected.startswith(so_far)
    assert so_far + stream.flush() == expected


@settings(max_examples=100, deadline=None)
@given(data=st.data(), skip=st.booleans())
def test_prompt_and_output_are_one_text(kind, data, skip):
    _, tokenizer = kind
    prompt = tokenizer.encode(data.draw(st.text("the wor.\n", max_size=9)), add_special_tokens=data.draw(st.booleans()))
    ids = tokenizer.encode(data.draw(st.text("the wor.\né€", max_size=9)), add_special_tokens=False)
    stream = tokenizer.stream(skip_special_tokens=skip, after=prompt)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    assert before + joined(stream, ids) == whole


def test_a_space_in_front_belongs_to_the_text_that_goes_on():
    tokenizer = with_added(byte_fallback())
    word = tokenizer.encode("the", add_special_tokens=False)
    for after, expected in (([], "the"), ([1], "the"), ([1, *word], " the")):
        assert joined(tokenizer.stream(after=after), word) == expected
    assert joined(tokenizer.stream(after=[1], skip_special_tokens=False), word) == " the"


def test_ids_beyond_the_vocabulary(kind):
    _, tokenizer = kind
    n, ids = tokenizer.vocab_size, [5, 6, 4]
    for after in ([], [5]):
        strict, lenient = tokenizer.stream(after=after), tokenizer.stream(after=after, ignore_unknown=True)
        for beyond in (n, n + 10**6):
            assert lenient.push(beyond) == ""
            with pytest.raises(ValueError, match=rf"token id {beyond} .*0 to {n - 1}"):
                strict.push(beyond)
        for stream in (strict, lenient):
            with pytest.raises(ValueError, match="token id -1 "):
                stream.push(-1)
        assert joined(lenient, [n, ids[0], n, *ids[1:], n]) == joined(strict, ids)
    for act in (tokenizer.token, tokenizer.token_bytes):
        with pytest.raises(ValueError, match=rf"token id {n} .*0 to {n - 1}"):
            act(n)


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_an_empty_place_in_the_vocabulary_is_no_text(make):
    content = json.loads(make().to_str())
    empty = content["model"]["vocab"].pop("," if make is byte_fallback else "#")
    inner = tokenizers.Tokenizer.from_str(json.dumps(content))
    inner.add_tokens(["<far>", "<further>"])
    tokenizer = Tokenizer(inner)
    assert tokenizer.token(empty) is None and tokenizer.token_bytes(empty) == b""
    ids = tokenizer.encode("the ꙮ hello", add_special_tokens=False)
    with_gaps = [empty, *(id for pair in zip(ids, [empty] * len(ids), strict=True) for id in pair)]
    assert joined(tokenizer.stream(), with_gaps) == tokenizer.decode(with_gaps) == "the ꙮ hello"


def test_bytes_of_tokens(kind):
    name, tokenizer = kind
    before = tokenizer.encode("the", add_special_tokens=False)
    for text in ("the worlds, the wall", "naïve é\n", "the<think>the"):
        ids = tokenizer.encode(text, add_special_tokens=False)
        raw = b"".join(map(tokenizer.token_bytes, ids))
        if name not in ("word pieces", "no decoder", "byte level, fused"):
            whole, first = (tokenizer.decode(part, skip_special_tokens=False) for part in ([*before, *ids], before))
            assert raw.decode() == whole[len(first) :]


def test_streams_of_many_threads():
    tokenizer = with_added(byte_level())
    ids = [id for id in range(tokenizer.vocab_size) for _ in range(2)]
    expected, got = tokenizer.decode(ids, skip_special_tokens=False), []
    threads = [
        threading.Thread(target=lambda: got.append(joined(tokenizer.stream(skip_special_tokens=False), ids)))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == [expected] * 8
