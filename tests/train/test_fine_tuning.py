"""From lines of JSON to a model that does what it did not: by the command line, whole and with an adapter."""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
import pytest

import maxlike.cli
from maxlike import LLM, SamplingParams, load
from maxlike.cli import EMBEDDED_MODEL
from maxlike.train.loss import token_logprobs

pytestmark = pytest.mark.slow
NAMES = ("left", "right", "name", "value", "index", "count", "path", "file", "line", "text", "key", "size")
LORA = ["--lora-rank", "8", "--lora-alpha", "32"]


def items(seed: int = 0) -> list[tuple[str, str]]:
    """Every pair of names with a digit, in some order: prompt and answer, in a format of our own."""
    found = [(f"{a} {n} {b} =>", f" <{b}:{n}:{a}>") for a in NAMES for b in NAMES if a != b for n in range(1, 4)]
    random.Random(seed).shuffle(found)
    return found


def write_items(file: Path, some: Sequence[tuple[str, str]]) -> Path:
    file.write_text("".join(json.dumps({"prompt": prompt, "completion": answer}) + "\n" for prompt, answer in some))
    return file


def exact(llm: LLM, some: Sequence[tuple[str, str]]) -> float:
    outputs = llm.generate([prompt for prompt, _ in some], SamplingParams(temperature=0.0, max_tokens=16))
    return float(np.mean([output.outputs[0].text == answer for output, (_, answer) in zip(outputs, some, strict=True)]))


def command(*argv: object) -> None:
    assert maxlike.cli.main([str(arg) for arg in argv]) == 0


@pytest.mark.parametrize("kind", ["whole", "lora"])
def test_learns_a_format(kind: str, tmp_path: Path, devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda *_: devices[:1])
    held_out, learned = items()[:40], items()[40:]
    assert exact(LLM(EMBEDDED_MODEL, dtype="float32"), held_out) == 0
    command("train", "--model", EMBEDDED_MODEL, "--data", write_items(tmp_path / "items.jsonl", learned),
            "--validation-files", write_items(tmp_path / "held.jsonl", held_out), "--output", tmp_path / "run",
            "--epochs", 4 if kind == "whole" else 6, "--tokens-per-batch", 512, "--dtype", "float32",
            "--learning-rate", "2e-3" if kind == "whole" else "1e-2", "--warmup-steps", 5, "--remat", "none",
            "--checkpoint-every-minutes", "none", *(LORA if kind == "lora" else []))
    command("export", tmp_path / "run", tmp_path / "exported", "--dtype", "float32")
    llm = LLM(tmp_path / "exported")
    assert exact(llm, held_out) >= 0.95
    prompts = [llm.tokenizer.encode(prompt) for prompt, _ in held_out[:4]]
    check_logprobs(tmp_path / "exported", llm, prompts, devices)
    check_against_transformers(tmp_path, llm, prompts, adapter=kind == "lora")


def check_logprobs(folder: Path, llm: LLM, prompts: list[list[int]], devices: list[jax.Device]) -> None:
    """What the engine says of tokens that it drew, step by step from its cache, is what training would say of them."""
    outputs = llm.generate(prompts, SamplingParams(temperature=1.0, seed=7, max_tokens=24, ignore_eos=True, logprobs=0))
    sequences = [[*prompt, *output.outputs[0].token_ids] for prompt, output in zip(prompts, outputs, strict=True)]
    tokens = np.concatenate(sequences).astype(np.int32)
    offsets = np.cumsum([0, *map(len, sequences)]).astype(np.int32)
    model = load(folder, devices=devices[:1], dtype="float32")

    @jax.jit
    def scored(tokens: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden, _ = model.hidden_states(tokens, None, offsets)
        with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
            return token_logprobs(model, hidden, targets), abs(model.output(hidden)).max()

    logprobs, largest = map(np.asarray, scored(tokens, np.roll(tokens, -1)))
    for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        given = [next(iter(entry.values())).logprob for entry in output.outputs[0].logprobs]
        first = offsets[i] + len(prompt) - 1
        np.testing.assert_allclose(logprobs[first:first + len(given)], given, rtol=0, atol=1e-5 * max(1, largest))


def check_against_transformers(folder: Path, llm: LLM, prompts: list[list[int]], adapter: bool) -> None:
    """Another program that reads the folder answers the same; and with the adapter on the base likewise."""
    pytest.importorskip("transformers")
    from tests.models.oracle import greedy
    from tests.models.oracle import load as load_oracle

    ours = [output.outputs[0].token_ids for output in llm.generate(
        prompts, SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))]
    theirs = [load_oracle(folder / "exported")]
    if adapter:
        peft = pytest.importorskip("peft")
        command("export", folder / "run", folder / "adapter", "--adapter")
        base = load_oracle(EMBEDDED_MODEL)
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of transformers, about peft
            theirs.append(peft.PeftModel.from_pretrained(base, folder / "adapter").eval())
    for model in theirs:
        model.generation_config.eos_token_id = None  # ours go on behind the end, too
        assert [greedy(model, prompt, 12) for prompt in prompts] == ours
