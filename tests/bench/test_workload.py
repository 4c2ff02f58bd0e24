"""Prompts: as long as asked, the same for a seed, with common beginnings where asked, and from files."""

import json
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import maxlike
from maxlike.bench.lengths import Lengths
from maxlike.bench.prompt_file import read_prompts
from maxlike.bench.workload import Prompt, Workload, WorkloadConfig, random_ids
from maxlike.models.tokenizer import Tokenizer

EMBEDDED = Path(maxlike.__file__).parent / "embedded"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(EMBEDDED)


def ids_workload(**fields: Any) -> Workload:
    return Workload(WorkloadConfig(**fields), "ids", vocabulary=np.arange(100, 1100))


def test_ids_are_of_the_vocabulary_and_as_long_as_asked() -> None:
    workload = ids_workload(num_prompts=300, input_len=Lengths.parse("uniform:5:9"),
                            output_len=Lengths.parse("uniform:2:3"))
    prompts = workload.prompts(1)
    assert len(prompts) == 300
    assert {len(prompt.content) for prompt in prompts} == {5, 6, 7, 8, 9}
    assert all(prompt.n_tokens == len(prompt.content) for prompt in prompts)
    assert {prompt.output_len for prompt in prompts} == {2, 3}
    ids = set(chain.from_iterable(prompt.content for prompt in prompts))
    assert ids <= set(range(100, 1100))
    assert len(ids) > 800  # about 2,100 draws of 1,000 ids: 122 are missing on average
    assert all(type(id) is int for id in ids)  # JSON knows no numpy


def test_the_same_for_a_seed_and_new_at_each_stage() -> None:
    first, again = ids_workload(seed=4), ids_workload(seed=4)
    assert first.prompts(1) == again.prompts(1)
    assert again.prompts(2) == first.prompts(2)  # whatever was drawn before
    seen = [prompt.content[:8] for stage in range(4) for prompt in first.prompts(stage)]
    assert len(set(seen)) == 400
    assert ids_workload(seed=5).prompts(1) != first.prompts(1)


def test_fewer_prompts_for_a_warm_up() -> None:
    assert len(ids_workload(num_prompts=50).prompts(0, 3)) == 3


def test_shared_prefixes() -> None:
    workload = ids_workload(num_prompts=60, input_len=Lengths.parse("4"), prefix_len=16, num_prefixes=3)
    prompts = [prompt for stage in (0, 1) for prompt in workload.prompts(stage, 60)]
    assert all(len(prompt.content) == prompt.n_tokens == 20 for prompt in prompts)
    assert len({prompt.content[:16] for prompt in prompts}) == 3  # the same ones at each stage
    assert len({prompt.content[16:] for prompt in prompts}) == 120


def test_longest_total() -> None:
    workload = ids_workload(num_prompts=200, input_len=Lengths.parse("uniform:1:90"), prefix_len=10,
                            output_len=Lengths.parse("uniform:1:90"), max_total_len=60)
    totals = [len(prompt.content) + prompt.output_len for prompt in workload.prompts(1)]
    assert max(totals) == 60
    assert all(prompt.output_len >= 1 and len(prompt.content) >= 11 for prompt in workload.prompts(1))


def test_text_has_the_tokens_asked_for(tokenizer: Tokenizer) -> None:
    config = WorkloadConfig(num_prompts=40, input_len=Lengths.parse("uniform:1:50"), prefix_len=30)
    prompts = Workload(config, "text", tokenizer=tokenizer).prompts(1)
    off = [len(tokenizer.encode(str(prompt.content))) - int(prompt.n_tokens or 0) for prompt in prompts]
    # A word that is cut may read as other tokens, at the end of the prefix and of the prompt.
    assert np.mean(off) == pytest.approx(0, abs=0.5)
    assert max(map(abs, off)) <= 2
    assert tokenizer.encode("") != []  # so that a text's own special tokens are in it
    heads = {tuple(tokenizer.encode(str(prompt.content))[:28]) for prompt in prompts}
    assert len(heads) == 1
    assert len({prompt.content for prompt in prompts}) == 40


def test_text_without_a_tokenizer_is_so_many_words() -> None:
    workload = Workload(WorkloadConfig(num_prompts=5, input_len=Lengths.parse("7"), prefix_len=2), "text")
    prompts = workload.prompts(1)
    assert [len(str(prompt.content).split()) for prompt in prompts] == [9] * 5
    assert [len(str(prompt.content).split(" ")) for prompt in prompts] == [9] * 5
    assert {prompt.n_tokens for prompt in prompts} == {None}
    assert "7 words" in str(workload)
    assert len({str(prompt.content)[:8] for prompt in prompts}) == 1


def test_random_ids_leave_out_special_tokens(tokenizer: Tokenizer) -> None:
    ids = random_ids(tokenizer, 5000)
    assert set(ids.tolist()) == set(range(tokenizer.vocab_size)) - tokenizer.special_ids
    assert tokenizer.special_ids
    assert random_ids(tokenizer, 10).max() < 10
    assert random_ids(None, 7).tolist() == list(range(7))


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"num_prompts": 0}, "num_prompts must be at least 1; got 0"),
        ({"prefix_len": -1}, "prefix_len must be at least 0"),
        ({"num_prefixes": 2}, "give prefix_len too"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"prefix_len": 8, "max_total_len": 9}, "at least 10; got 9"),
        ({"prompts": Path("x"), "input_len": Lengths.parse("3")}, "as long as they are"),
        ({"prompts": Path("x"), "prefix_len": 3}, "as long as they are"),
    ],
)
def test_refused(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        WorkloadConfig(**fields)


# -- files


def write(folder: Path, text: str) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


def lines(*values: Any) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def test_json_lines(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    # A line separator inside a string is no end of a line.
    entries = read_prompts(write(tmp_path, '{"prompt": "a\u2028b"}\n\n' + lines(
        {"prompt": [1, 2], "output_len": 5, "other": 3}, {"messages": messages})))
    assert [entry.content for entry in entries] == ["a\u2028b", (1, 2), tuple(messages)]
    assert [entry.output_len for entry in entries] == [None, 5, None]


def test_sharegpt(tmp_path: Path) -> None:
    conversations = [
        [{"from": "system", "value": "be kind"}, {"from": "human", "value": "Q1"}, {"from": "gpt", "value": "A1"},
         {"from": "human", "value": "Q2"}, {"from": "gpt", "value": "A2"}],
        [{"from": "gpt", "value": "nobody asked"}],
        [],
        [{"from": "user", "value": "Q3"}, {"from": "assistant", "value": "A3"}],
    ]
    entries = read_prompts(write(tmp_path, json.dumps([{"id": i, "conversations": c}
                                                       for i, c in enumerate(conversations)], indent=1)))
    assert [(entry.content, entry.reply) for entry in entries] == [("Q1", "A1"), ("Q3", "A3")]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "holds no prompt"),
        ('{"prompt": "x"}\nnope\n', "line 2 is not JSON"),
        ("[1, 2", "begins like a JSON array"),
        ("[3]", "entry 1: expected an object"),
        ('{"text": "x"}', "line 1: expected an object with `prompt`.*got text"),
        ('{"prompt": "x", "messages": []}', "got prompt, messages"),
        ('{"prompt": ""}', "not empty; got ''"),
        ('{"prompt": []}', "not empty"),
        ('{"prompt": [1, -2]}', "token ids"),
        ('{"prompt": [true]}', "token ids"),
        ('{"prompt": 5}', "got 5"),
        ('{"messages": "hello"}', "messages must be a list of objects"),
        ('{"conversations": "hello"}', "conversations must be a list of objects"),
        ('{"prompt": "x", "output_len": 0}', "output_len must be a whole number of at least 1; got 0"),
        ('{"prompt": "x", "output_len": true}', "output_len must be"),
        ('[{"conversations": []}]', "holds no prompt"),
        ("[" * 100_000, "begins like a JSON array"),
    ],
)
def test_files_refused(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told) as error:
        read_prompts(write(tmp_path, text))
    assert "prompts.jsonl" in str(error.value)
    assert len(str(error.value)) < 600


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "missing")
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(ValueError, match="not UTF-8"):
        read_prompts(tmp_path / "latin")


def test_a_file_is_shuffled_and_begins_again(tmp_path: Path) -> None:
    file = write(tmp_path, lines(*({"prompt": f"p{i}"} for i in range(20))))
    workload = Workload(WorkloadConfig(num_prompts=15, prompts=file), "text")
    first, second = workload.prompts(1), workload.prompts(2)
    names = [f"p{i}" for i in range(20)]
    taken = [str(prompt.content) for prompt in first + second]
    assert sorted(taken[:20]) == sorted(names)
    assert taken[:20] != names
    assert taken[20:] == taken[:10]
    assert workload.repeated == 10
    again = Workload(WorkloadConfig(num_prompts=15, prompts=file), "text")
    assert again.prompts(1) == first


def test_output_lengths_of_a_file(tmp_path: Path, tokenizer: Tokenizer) -> None:
    reply = "import os\n" * 3
    file = write(tmp_path, json.dumps([
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": reply}]},
        {"prompt": "b", "output_len": 9}, {"prompt": [1, 2, 3]}]))

    def outputs(**fields: Any) -> list[int]:
        workload = Workload(WorkloadConfig(num_prompts=3, prompts=file, **fields), "text", tokenizer=tokenizer)
        return sorted(prompt.output_len for prompt in workload.prompts(1))

    assert outputs() == sorted([len(tokenizer.encode(reply)), 9, 128])
    assert outputs(output_len=Lengths.parse("33")) == [33, 33, 33]
    bare = Workload(WorkloadConfig(num_prompts=3, prompts=file), "text")
    assert sorted(prompt.output_len for prompt in bare.prompts(1)) == [9, 128, 128]


def test_long_prompts_of_a_file_are_left_out(tmp_path: Path) -> None:
    file = write(tmp_path, lines({"prompt": [1] * 5, "output_len": 5}, {"prompt": [1] * 6, "output_len": 5}))
    workload = Workload(WorkloadConfig(num_prompts=4, prompts=file, max_total_len=10), "text")
    assert workload.prompts(1) == [Prompt((1,) * 5, 5, 5)] * 4
    assert workload.left_out == 1
    with pytest.raises(ValueError, match="None of the 2 prompts"):
        Workload(WorkloadConfig(prompts=file, max_total_len=9), "text")
    text = write(tmp_path, lines({"prompt": "hello"}))
    with pytest.raises(ValueError, match="give a tokenizer"):
        Workload(WorkloadConfig(prompts=text, max_total_len=9), "text")
