"""The embedded model's makers: the split, the documents, a few steps of training, the measures."""

import json
import math
import random
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import numpy as np
import pytest
import tokenizers

import maxlike
from maxlike.models.registry import unparse_config
from maxlike.models.safetensors import Checkpoint

ROOT = Path(__file__).resolve().parents[2]
EMBEDDED = ROOT / "maxlike" / "embedded"

SOURCE = '''import os


class Stack:
    """Last in, first out."""

    @property
    def top(self):
        return self.items[-1]

    def push(
        self, item,
        count=1,
    ):
        for _ in range(count):
            self.items.append(item)

    def empty(self): return not self.items

    def full(self):
        # never
        return False


def total(numbers):
\tresult = 0
\tfor number in numbers:
\t\tresult += number
\treturn result
'''


@pytest.fixture(scope="module")
def scripts() -> tuple[ModuleType, ModuleType, ModuleType]:
    """The corpus, the measures and the training, imported as they import each other."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import eval_tiny
        import tiny_corpus
        import train_tiny
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    return tiny_corpus, eval_tiny, train_tiny


@pytest.fixture(scope="module")
def corpus(scripts, tmp_path_factory: pytest.TempPathFactory):
    """Sixty files of made-up functions."""
    root = tmp_path_factory.mktemp("library")
    draw = random.Random(0)
    for i in range(60):
        names = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(6)]
        (root / f"module_{i}.py").write_text("\n\n".join(
            f"def {name}_{i}(x, y):\n    {name} = x + {j}\n    if {name} > y:\n        return {name}\n    return y\n"
            for j, name in enumerate(names)))
    return scripts[0].Corpus.of_folder(root)


@pytest.fixture(scope="module")
def tokenizer(scripts, corpus) -> tokenizers.Tokenizer:
    return scripts[0].train_tokenizer((file.text for file in corpus.training), 400)


def test_split_goes_by_path_alone(scripts, tmp_path: Path) -> None:
    for name in [*(f"m{i}.py" for i in range(40)), "test/t.py", "pkg/tests/t.py", "encodings/cp1.py",
                 "site-packages/s.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"x = {name!r}\n")
    (tmp_path / "copy.py").write_text("x = 'm0.py'\n")
    (tmp_path / "empty.py").write_text("\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\nx = '\xe9'\n")
    first = scripts[0].Corpus.of_folder(tmp_path)
    paths = [[file.path for file in part] for part in (first.training, first.held_out)]
    # The first of two equal texts stays; of m0.py and copy.py that is copy.py.
    assert sorted([*paths[0], *paths[1]]) == sorted([*(f"m{i}.py" for i in range(1, 40)), "copy.py"])
    for file in first.held_out:
        (tmp_path / file.path).write_text("y = 'changed ' + " + repr(file.path))
    second = scripts[0].Corpus.of_folder(tmp_path)
    assert [file.path for file in second.held_out] == paths[1]


def test_split_needs_both_parts(scripts, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 files to train on and 0 to hold out"):
        scripts[0].Corpus.of_folder(tmp_path)


def test_functions_stand_alone(scripts) -> None:
    found = {function.head: function.text for function in scripts[0].functions_of(SOURCE)}
    assert found == {
        "def top(self):": "def top(self):\n    return self.items[-1]",
        "def push(\n    self, item,\n    count=1,\n):": "def push(\n    self, item,\n    count=1,\n):\n"
                                                      "    for _ in range(count):\n        self.items.append(item)",
        "def total(numbers):": SOURCE[SOURCE.index("def total"):-1],
    }
    assert list(scripts[0].functions_of("def broken(:\n")) == []


@pytest.mark.parametrize("text", [SOURCE, "a\r\n\tb = 'é🙂\x00'\n\n\n", "  lead", "x = 0x1234567 ** 3.5", "<|begin|>"])
def test_tokenizer_is_lossless(scripts, tokenizer: tokenizers.Tokenizer, text: str) -> None:
    corpus = scripts[0]
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    assert ids[0] == tokenizer.token_to_id(corpus.BEGIN) == 0
    assert corpus.encode_documents(tokenizer, [text]) == [[*ids, tokenizer.token_to_id(corpus.END)]]


@pytest.mark.parametrize("cut", ["def f(x):", "def f(x):\n", "def f(x):\n    ", "def f(x):\n    return"])
def test_tokenizer_cuts_prompts_as_it_cuts_texts(tokenizer: tokenizers.Tokenizer, cut: str) -> None:
    whole, prompt = (tokenizer.encode(text).ids for text in (cut + {":": "\n    y", "\n": "    y"}.get(cut[-1], "y")
                                                             if cut[-1] != "n" else cut + " x\n", cut))
    assert whole[:len(prompt)] == prompt


@pytest.fixture(scope="module")
def recipe(scripts):
    """A toy of one layer."""
    return scripts[2].Recipe(
        vocab_size=400, hidden_size=32, intermediate_size=48, layers=1, heads=4, kv_heads=2,
        max_position_embeddings=128, batch_tokens=1024, window_lengths=(64, 128), shuffle_buffer=64, learning_rate=0.02)


def test_documents_are_the_training_files_and_their_functions(scripts, corpus, recipe, tmp_path: Path) -> None:
    scripts[2].prepare(corpus, recipe, tmp_path)
    files, functions, held_out = (
        [json.loads(line)["text"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("files", "functions", "held_out"))
    assert files == [file.text for file in corpus.training]
    assert held_out == [corpus.held_out[0].text]
    assert len(set(functions)) == len(functions) == 6 * len(files)
    assert all(any(function in text for text in files) for function in functions)
    few = replace(recipe, function_tokens=30)
    scripts[2].prepare(corpus, few, tmp_path)
    short = [json.loads(line)["text"] for line in (tmp_path / "functions.jsonl").read_text().splitlines()]
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert short == [text for text in functions if 16 <= len(tokenizer.encode(text).ids) + 1 <= 30]


def test_the_embedded_model_stays_as_large_as_it_is(scripts, tmp_path: Path) -> None:
    """What the recipe describes is what lies there, but for what training changes."""
    tokenizer = tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    described = unparse_config(scripts[2].Recipe().describe(tokenizer))
    assert described == json.loads((EMBEDDED / "config.json").read_text())


@pytest.fixture(scope="module")
def trained(scripts, corpus, recipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy, trained for 30 steps."""
    folder = tmp_path_factory.mktemp("toy")
    assert scripts[2].make(corpus, recipe, folder / "work", folder / "made", steps=30)
    return folder / "made"


def test_a_finished_run_is_not_run_again(scripts, corpus, recipe, trained: Path, tmp_path: Path) -> None:
    """The same command exports once more what is there, over what is there."""
    (tmp_path / "model.safetensors").write_bytes(b"another")
    assert scripts[2].make(corpus, recipe, trained.parent / "work", tmp_path, steps=30)
    names = {file.name for file in trained.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
                     "tokenizer_config.json"} == {file.name for file in tmp_path.iterdir()}
    for name in names:
        assert (trained / name).read_bytes() == (tmp_path / name).read_bytes()


def test_training_learns_and_saves(scripts, corpus, trained: Path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    with Checkpoint.open(trained) as checkpoint:
        assert {info.dtype.name for info in checkpoint.tensors.values()} == {"bfloat16"}
        assert "lm_head.weight" not in checkpoint.tensors
    bits = scripts[1].measure(trained, corpus, context=64, heads=3)["bits_per_byte"]
    tokens = sum(len(tokenizer.encode(file.text).ids) for file in corpus.held_out)
    guessing = tokens * math.log2(tokenizer.get_vocab_size()) / sum(len(f.text) for f in corpus.held_out)
    assert bits < 0.6 * guessing


def test_bits_per_byte_scores_every_token_once(scripts, corpus, trained: Path) -> None:
    """Against one call a token, on what it should see: its window as far as itself."""
    corpus_script, measures, _ = scripts
    tokenizer = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    model = maxlike.load(trained, devices=jax.devices()[:1], dtype="float32")
    file = corpus_script.SourceFile("short.py", corpus.held_out[0].text[:200])
    ids = np.array(corpus_script.encode_documents(tokenizer, [file.text])[0], np.int32)
    assert len(ids) > 60 and (len(ids) - 1) % 16  # several windows, the last one not full
    nats = 0.0
    for target in range(1, len(ids)):
        # Windows of 32 inputs begin at multiples of 16; a token counts in the first that holds its input.
        start = 0 if target <= 32 else (target - 17) // 16 * 16
        assert start == 0 or 16 <= target - 1 - start < 32
        seen = ids[start:target]
        (logits,), _ = model(np.pad(seen, (0, 32 - len(seen))), None, None, np.array([0, len(seen)], np.int32))
        row = np.asarray(logits[0], np.float64)
        nats += np.log(np.exp(row - row.max()).sum()) + row.max() - row[ids[target]]
    expected = nats / math.log(2) / 200
    assert measures.bits_per_byte(model, tokenizer, [file], 32) == pytest.approx(expected, rel=1e-4)


def test_continuing_takes_the_likeliest_each_time(scripts, trained: Path) -> None:
    """Through the cache, three prompts at once, against one call without a cache on all that came out."""
    tokenizer = tokenizers.Tokenizer.from_file(str(trained / "tokenizer.json"))
    model = maxlike.load(trained, devices=jax.devices()[:1], dtype="float32")
    prompts = [tokenizer.encode(text).ids for text in ("def f(x):", "def abcd_1(x, y):\n    ", "if")]
    free = scripts[1].continue_greedily(model, prompts, 8, end=-1)
    whole = [[*prompt, *row] for prompt, row in zip(prompts, free, strict=True)]
    offsets = np.cumsum([0, *map(len, whole)])
    scorer = maxlike.load(trained, devices=jax.devices()[:1], dtype="float32", return_logits="all")
    (_, logits, _), _ = scorer(np.concatenate(whole), None, None, offsets)
    likeliest = np.asarray(logits).argmax(-1)
    for prompt, row, start in zip(prompts, free, offsets, strict=False):
        assert row == likeliest[start + len(prompt) - 1:][:8].tolist()
    ended = scripts[1].continue_greedily(model, prompts, 8, end=free[0][3])
    assert ended[0] == free[0][:free[0].index(free[0][3]) + 1]


@pytest.mark.parametrize(("continuation", "complete", "expected"), [
    ("\n    return 1", True, True),
    ("\n    return (", True, False),
    ("\n    return 1\n    x = (", False, True),
    ("\n    return (\n    x", False, False),
    (" return 1 +", False, False),  # nothing but an unfinished line proves nothing
    ("", True, False),
    ("\n    ", False, False),
    ("\n    '''\n    x\n", False, False),
])
def test_parses(scripts, continuation: str, complete: bool, expected: bool) -> None:
    assert scripts[1].parses("def f():", continuation, complete) is expected


@pytest.mark.skipif(not (EMBEDDED / "tokenizer.json").is_file(), reason="no embedded model")
def test_embedded_model_fits_its_tokenizer() -> None:
    model = maxlike.load(EMBEDDED, devices=jax.devices()[:1])
    tokenizer = tokenizers.Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    assert model.vocab_size == tokenizer.get_vocab_size()
    assert sum(file.stat().st_size for file in EMBEDDED.iterdir()) <= 16_000_000
