"""What a line becomes, and every way in which it may be bad."""

import itertools
import json
import re

import numpy as np
import pytest

from maxlike.train.examples import Encoder, EncodingConfig
from maxlike.train.records import Record
from tests.train.corpora import CHATML, GEMMA, MARKED, THINKING, say, tokenizer_of


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


def encode(tokenizer, value, preference=False, max_seq_len=60, max_group_len=120, **config):
    line = value if isinstance(value, bytes) else json.dumps(value).encode()
    encoder = Encoder(tokenizer, EncodingConfig(max_seq_len, max_group_len, **config), preference)
    return encoder(Record("data.jsonl, line 7", line))


def learned(tokenizer, example):
    """(all, what is learned of it) as text."""
    return tuple(tokenizer.decode(ids, skip_special_tokens=False)
                 for ids in (example.tokens, example.tokens[example.weights > 0]))


def only(tokenizer, value, **config):
    [[example]] = encode(tokenizer, value, **config).groups
    return learned(tokenizer, example)


def test_text(tokenizer):
    assert only(tokenizer, {"text": "the fox"}) == ("<s>the fox</s>",) * 2
    assert only(tokenizer, {"text": "the fox</s>"}) == ("<s>the fox</s>",) * 2
    assert only(tokenizer, b'\xef\xbb\xbf{"text": "\\u00e9"}')[0] == "<s>é</s>"


@pytest.mark.parametrize("limit", [2, 3, 7, 59, 60, 61])
def test_long_text_is_cut_into_windows(tokenizer, limit):
    text = "The quick brown fox. " * 12
    ids = [*tokenizer.encode(text), tokenizer.eos_token_id]
    groups = encode(tokenizer, {"text": text}, max_seq_len=limit).groups
    assert all(len(group) == 1 and 2 <= len(group[0]) <= limit for group in groups)
    windows = [group[0].tokens.tolist() for group in groups]
    assert [pair for window in windows for pair in itertools.pairwise(window)] == list(
        itertools.pairwise(ids))  # every token is a target once, after the one before it
    assert all((group[0].weights == 1).all() for group in groups)


def test_conversations(tokenizer):
    record = {"messages": say("a", "b", "c", "d")}
    whole = tokenizer.apply_chat_template(record["messages"], add_generation_prompt=False)
    assert only(tokenizer, record) == (whole, "b<|im_end|>d<|im_end|>")
    assert only(tokenizer, record, train_on="all") == (whole, whole)
    [[one], [two]] = encode(tokenizer, record, turns="apart").groups
    assert learned(tokenizer, one) == (whole[: whole.index("<|im_start|>user\nc")], "b<|im_end|>")
    assert learned(tokenizer, two) == (whole, "d<|im_end|>")


def test_tools_and_variables_of_a_record(tmp_path):
    tokenizer = tokenizer_of(tmp_path, "{{ tools[0].name }}{{ word }}{{ other }}" + CHATML)
    record = {"messages": say("a", "b"), "tools": [{"name": "f"}], "chat_template_kwargs": {"word": "own"}}
    text, _ = only(tokenizer, record, template_variables={"word": "general", "other": "+"})
    assert text.startswith("fown+<|im_start|>")


def test_a_template_that_drops_thinking_learns_turns_apart(tmp_path):
    tokenizer = tokenizer_of(tmp_path, THINKING)
    record = {"messages": say("a", "<think>1</think>b", "c", "<think>2</think>d")}
    assert encode(tokenizer, record).bad == "unstable_template"
    groups = encode(tokenizer, record, turns="apart", max_seq_len=100).groups
    assert [learned(tokenizer, *group)[1] for group in groups] == [
        "<think>1</think>b<|im_end|>", "<think>2</think>d<|im_end|>"]


def test_completions(tokenizer, tmp_path):
    record = {"prompt": "the quick", "completion": " brown fox"}
    assert only(tokenizer, record) == ("<s>the quick brown fox</s>", " brown fox</s>")
    assert only(tokenizer, record, train_on="all") == ("<s>the quick brown fox</s>",) * 2
    assert only(tokenizer, {"prompt": "", "completion": "fox"})[1] == "fox</s>"
    record = {"prompt": say("a", "b", "c"), "completion": say("", "d", "e", "f")[1:]}
    for other in (tokenizer, tokenizer_of(tmp_path, MARKED["chatml"])):
        assert only(other, record)[1] == "d<|im_end|>f<|im_end|>"  # not the prompt's `b`


def test_the_boundary_of_a_completion_is_where_tokens_differ(tokenizer):
    whole, prompt = tokenizer.encode("the quick"), tokenizer.encode("the qu")
    assert whole[: len(prompt)] != prompt  # else this tests nothing
    [[example]] = encode(tokenizer, {"prompt": "the qu", "completion": "ick"}).groups
    same = next(i for i, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b)
    assert example.tokens.tolist() == [*whole, tokenizer.eos_token_id]
    assert example.weights.tolist() == [0] * same + [1] * (len(whole) + 1 - same)


def test_preferences(tokenizer):
    strings = {"prompt": "the", "chosen": " fox", "rejected": " dog"}
    [pair] = encode(tokenizer, strings, preference=True).groups
    assert [learned(tokenizer, side) for side in pair] == [("<s>the fox</s>", " fox</s>"),
                                                           ("<s>the dog</s>", " dog</s>")]
    explicit = {"prompt": say("a"), "chosen": say("", "b")[1:], "rejected": say("", "c")[1:]}
    implicit = {"chosen": say("a", "b"), "rejected": say("a", "c")}
    for record in (explicit, implicit):
        [pair] = encode(tokenizer, record, preference=True, train_on="all").groups
        assert [learned(tokenizer, side)[1] for side in pair] == ["b<|im_end|>", "c<|im_end|>"]


LONG = "words and more " * 30


@pytest.mark.parametrize(("value", "kind", "says"), [
    (b'{"text": "a"', "not_json", "not JSON"),
    (b'{"text": "a\r\n', "not_json", "not JSON: Unterminated string starting at, column 10"),
    (b"[" * 100_000, "not_json", "not JSON"),
    (b'{"text": "\xff"}', "not_utf8", "byte 10 of the line"),
    ([1], "not_an_object", r"got \[1\]"),
    ({}, "missing_keys", "got only nothing"),
    ({"txt": "a"}, "missing_keys", "got only txt"),
    ({"prompt": "a"}, "missing_keys", "got only prompt"),
    ({"text": None}, "missing_keys", "got only text"),
    ({"text": "a", "messages": say("a", "b")}, "missing_keys", "several formats"),
    ({"text": 3}, "wrong_type", "text must be a string; got 3"),
    ({"text": ""}, "empty", "text is empty"),
    ({"text": "\ud83d"}, "wrong_type", "surrogate"),
    ({"messages": []}, "empty", "no conversation"),
    ({"messages": "a"}, "wrong_type", "list of objects"),
    ({"messages": ["a"]}, "wrong_type", "list of objects"),
    ({"messages": [{"content": "a"}]}, "wrong_type", r"messages\[0\].role must be text"),
    ({"messages": [*say("a"), {"role": "robot", "content": "b"}]}, "unknown_role", r"messages\[1\].role 'robot'"),
    ({"messages": [*say("a"), {"role": "assistant", "content": 3}]}, "wrong_type", r"messages\[1\].content"),
    ({"messages": [*say("a"), {"role": "assistant"}]}, "wrong_type", r"messages\[1\].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "wrong_type", "parts"),
    ({"messages": [*say("a"), {"role": "assistant", "tool_calls": 3}]}, "wrong_type", "tool_calls must be"),
    ({"messages": [*say("a"), {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
     "wrong_type", "arguments must be a JSON object"),
    ({"messages": say("a")}, "no_assistant_turn", "no assistant turn"),
    ({"messages": say("a", "b"), "tools": "f"}, "wrong_type", "tools must be a list"),
    ({"messages": say("a", "b"), "chat_template_kwargs": 3}, "wrong_type", "must be an object"),
    ({"messages": say("a", "b"), "chat_template_kwargs": {"tools": []}}, "wrong_type", "may not set tools"),
    ({"messages": say(LONG, "b")}, "too_long", "at most 60 are allowed"),
    ({"prompt": "a", "completion": ""}, "empty", "completion is empty"),
    ({"prompt": "a", "completion": say("b")}, "wrong_type", "must both be strings"),
    ({"prompt": [], "completion": say("", "b")[1:]}, "empty", "prompt is empty"),
    ({"prompt": say("a", "b"), "completion": say("a")}, "no_assistant_turn", "in completion"),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "other_format", "cannot be mixed"),
])
def test_bad_data_is_named(tokenizer, value, kind, says):
    encoded = encode(tokenizer, value)
    assert (encoded.bad, encoded.groups) == (kind, ())
    assert encoded.message.startswith("data.jsonl, line 7: ")
    assert re.search(says, encoded.message)


@pytest.mark.parametrize(("value", "kind"), [
    ({"text": "a"}, "other_format"),
    ({"chosen": "a", "rejected": "b"}, "missing_keys"),
    ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty"),
    ({"prompt": LONG, "chosen": "a", "rejected": "b"}, "too_long"),
    ({"prompt": say("a"), "chosen": say("a"), "rejected": say("", "b")[1:]}, "no_assistant_turn"),
])
def test_bad_preferences(tokenizer, value, kind):
    assert encode(tokenizer, value, preference=True).bad == kind


def test_a_format_that_is_asked_for(tokenizer):
    both = {"text": "a", "messages": say("a", "b")}
    assert only(tokenizer, both, format="text")[0] == "<s>a</s>"
    assert "expected `prompt` and `completion`" in encode(tokenizer, both, format="completion").message


def test_too_long(tokenizer):
    text = {"text": LONG}
    assert encode(tokenizer, text, long_text="bad").bad == "too_long"
    cut = encode(tokenizer, text, long_text="truncate")
    assert [len(example) for [example] in cut.groups] == [60] and cut.truncated == 1
    chat = {"messages": say("a", LONG)}
    cut = encode(tokenizer, chat, too_long="truncate")
    assert [len(example) for [example] in cut.groups] == [60] and cut.truncated == 1
    assert encode(tokenizer, {"messages": say(LONG, "b")}, too_long="truncate").bad == "prompt_too_long"
    pair = {"prompt": "a", "chosen": LONG, "rejected": "b"}
    [group] = encode(tokenizer, pair, preference=True, too_long="truncate", max_group_len=60).groups
    assert len(group[0]) == 30 and len(group[1]) < 30
    fits = {"prompt": "a", "chosen": "b" * 40, "rejected": "b"}
    assert not encode(tokenizer, fits, preference=True, max_group_len=60).bad  # together, if not each in its half
    assert encode(tokenizer, fits, preference=True, max_group_len=40).bad == "too_long"


def test_what_no_record_can_help(tmp_path):
    bare = tokenizer_of(tmp_path / "a", None)
    with pytest.raises(ValueError, match="no chat template"):
        encode(bare, {"messages": say("a", "b")})
    with pytest.raises(ValueError, match="no eos_token"):
        encode(tokenizer_of(tmp_path / "b", eos_token=None), {"text": "a"})
    refused = encode(tokenizer_of(tmp_path / "c", GEMMA), {"messages": say("a", "b", system="s")})
    assert refused.bad == "template" and "must alternate" in refused.message


def test_types(tokenizer):
    for value in ({"text": "a"}, {"messages": say("a", "b")}, {"prompt": "a", "completion": "b"}):
        [[example]] = encode(tokenizer, value).groups
        assert (example.tokens.dtype, example.weights.dtype) == (np.int32, np.float32)
        assert example.tokens.shape == example.weights.shape
