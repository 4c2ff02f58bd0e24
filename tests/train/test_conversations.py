"""The assistant's tokens, against `transformers` where the template marks them and by hand where it does not."""

import pytest

from maxlike.train.conversations import ChatEncoder, check_messages
from maxlike.train.records import DataError
from tests.train.corpora import CHATML, MARKED, TEMPLATES, THINKING, say, tokenizer_of

CHATS = {
    "one": say("Hello", "Hi there."),
    "two": say("the quick", "brown fox", "and é🎉", "more\n\nwords 123 "),
    "last is a question": say("the quick", "brown fox", "and?"),
    "newlines": say("a", "\n\nb\n\n", "c", " d"),
    "empty answer": say("a", "", "c", "d"),
}


def learned_texts(tokenizer, ids, learned):
    """The text of every run of learned tokens."""
    runs = []
    for i, flag in enumerate(learned):
        if flag and (i == 0 or not learned[i - 1]):
            runs.append([])
        if flag:
            runs[-1].append(ids[i])
    return [tokenizer.decode(run, skip_special_tokens=False) for run in runs]


def turns_of(messages):
    return [i for i, message in enumerate(messages) if message["role"] == "assistant"]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", MARKED)
def test_marks_are_read_as_transformers_reads_them(tmp_path, family, chat):
    transformers = pytest.importorskip("transformers")
    ours = tokenizer_of(tmp_path, MARKED[family])
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = theirs.apply_chat_template(CHATS[chat], return_dict=True, return_assistant_tokens_mask=True)
    ids, learned = ChatEncoder(ours).encode(CHATS[chat], turns_of(CHATS[chat]))
    assert ids.tolist() == expected["input_ids"] and ids.dtype == "int32"
    assert learned.tolist() == [bool(flag) for flag in expected["assistant_masks"]] and learned.any()


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("family", TEMPLATES)
def test_turns_are_found_without_marks(tmp_path, family, chat):
    tokenizer, messages = tokenizer_of(tmp_path, TEMPLATES[family]), CHATS[chat]
    ids, learned = ChatEncoder(tokenizer).encode(messages, turns_of(messages))
    assert ids.tolist() == tokenizer.encode_chat(messages, add_generation_prompt=False)
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}[family]
    expected = []
    for turn in turns_of(messages):
        content = messages[turn]["content"]
        content = content.strip() if family in ("llama3", "gemma") else content
        expected.append((" " if family == "mistral" else "") + content + end)
    # A token that the header's newline and the answer's first one share is learned with the answer.
    assert [text.lstrip("\n") for text in learned_texts(tokenizer, ids, learned)] == [t.lstrip("\n") for t in expected]


def test_marks_and_prefixes_agree(tmp_path):
    marked, plain = tokenizer_of(tmp_path / "a", MARKED["chatml"]), tokenizer_of(tmp_path / "b", CHATML)
    for messages in CHATS.values():
        for turns in (turns_of(messages), turns_of(messages)[-1:]):
            for a, b in zip(*(ChatEncoder(t).encode(messages, turns) for t in (marked, plain)), strict=True):
                assert a.tolist() == b.tolist()


def test_the_end_of_a_turn_is_learned_though_the_marks_leave_it_out(tmp_path):
    template = MARKED["chatml"].replace("{{ m.content + '<|im_end|>' }}{% endgeneration %}",
                                        "{{ m.content }}{% endgeneration %}<|im_end|>")
    tokenizer = tokenizer_of(tmp_path, template)
    ids, learned = ChatEncoder(tokenizer).encode(CHATS["one"], [1])
    assert learned_texts(tokenizer, ids, learned) == ["Hi there.<|im_end|>"]


def test_only_the_turns_asked_for(tmp_path):
    for template in (CHATML, MARKED["chatml"]):
        tokenizer = tokenizer_of(tmp_path, template)
        ids, learned = ChatEncoder(tokenizer).encode(CHATS["two"], [1])
        assert learned_texts(tokenizer, ids, learned) == ["brown fox<|im_end|>"]


def test_a_template_that_drops_earlier_thinking(tmp_path):
    tokenizer = tokenizer_of(tmp_path, THINKING)
    thought = say("a", "<think>hm</think>b", "c", "<think>so</think>d")
    with pytest.raises(DataError, match=r"messages\[1\] differently when others follow.*turns='apart'") as raised:
        ChatEncoder(tokenizer).encode(thought, [1, 3])
    assert raised.value.kind == "unstable_template"
    ids, learned = ChatEncoder(tokenizer).encode(thought, [3])
    assert learned_texts(tokenizer, ids, learned) == ["<think>so</think>d<|im_end|>"]


@pytest.mark.parametrize(("template", "messages", "kind", "says"), [
    (TEMPLATES["gemma"], say("a", "b", system="s"), "template", "must alternate"),
    (CHATML, [{"role": "assistant", "content": "b"}], "template", "begins with the assistant"),
    (CHATML, say("a", "\ud83d"), "wrong_type", "surrogate"),
    ("{% for m in messages %}{% set x %}{% generation %} {{ m.content }} {% endgeneration %}{% endset %}{{ x | trim }}"
     "{% endfor %}", say("a", "b"), "unstable_template", "generation marks"),
])
def test_what_the_template_cannot_do(tmp_path, template, messages, kind, says):
    turns = turns_of(messages)
    with pytest.raises(DataError, match=says) as raised:
        ChatEncoder(tokenizer_of(tmp_path, template)).encode(messages, turns)
    assert raised.value.kind == kind


def test_without_a_template_no_record_can_help(tmp_path):
    with pytest.raises(ValueError, match="no chat template") as raised:
        ChatEncoder(tokenizer_of(tmp_path, None)).encode(CHATS["one"], [1])
    assert not isinstance(raised.value, DataError)


def test_tool_calls_and_variables(tmp_path):
    tokenizer = tokenizer_of(tmp_path, CHATML + "{{ suffix }}")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = check_messages([{"role": "user", "content": [{"type": "text", "text": "a"},
                                                            {"type": "text", "text": "b"}]},
                               {"role": "assistant", "content": None, "tool_calls": [call]},
                               {"role": "tool", "content": "1"}, *say("", "done")[1:]], "messages")
    ids, learned = ChatEncoder(tokenizer, {"suffix": ""}).encode(messages, [1, 3])
    assert learned_texts(tokenizer, ids, learned) == ['<tool>f{"x": 1}<|im_end|>', "done<|im_end|>"]
    assert "user\na\nb<|im_end|>" in tokenizer.decode(ids, skip_special_tokens=False)
