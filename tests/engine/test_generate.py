"""The generation loop against a recomputation of the whole sequence without a cache, and its limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import maxlike
from maxlike import ReturnLogits
from maxlike.engine.generate import PREFILL_CHUNK, Figures, generate
from maxlike.engine.runner import ModelRunner
from maxlike.engine.sampling_params import SamplingParams
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from tests.compilation_cache import compiling_once
from tests.models.checkpoints import config_of, write

ROOM = 1100  # tokens of the recomputation's one program
PROMPT = [5, 1002, 0]


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Each generation compiles its own steps, and many here are the same."""
    with compiling_once(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Mistral of one layer; its window of 100 tokens ends inside chunks, and its vocabulary is odd."""
    folder = tmp_path_factory.mktemp("model")
    write(folder, config_of("mistral", num_hidden_layers=1, sliding_window=100, max_position_embeddings=2048))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path, devices: list[jax.Device]) -> DistributedTransformer:
    return maxlike.load(folder, devices=devices[:1])


@pytest.fixture(scope="module")
def scorer(folder: Path, devices: list[jax.Device]) -> DistributedTransformer:
    return maxlike.load(folder, devices=devices[:1], return_logits=ReturnLogits.ALL)


def prompt_of(n: int) -> list[int]:
    return np.random.default_rng(n).integers(0, 1003, n).tolist()


def recomputed(scorer: DistributedTransformer, prompt: list[int], continuation: list[int]) -> list[int]:
    """The likeliest token behind the prompt and behind each token of its continuation but the last."""
    tokens = [*prompt, *continuation[:-1]]
    offsets = np.array([0, len(tokens)], np.int32)
    (_, logits, _), _ = scorer(np.pad(np.array(tokens), (0, ROOM - len(tokens))), None, None, offsets)
    return np.asarray(logits)[len(prompt) - 1:len(tokens)].argmax(-1).tolist()


# A chunk is a power of two up to PREFILL_CHUNK; prompts end inside one, at its end and just behind it.
@pytest.mark.parametrize("n", [3, 700, *(pytest.param(n, marks=pytest.mark.slow) for n in (
    1, 8, 9, 64, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, 2 * PREFILL_CHUNK + 1))])
def test_greedy_tokens_are_those_of_a_recomputation(n: int, model: DistributedTransformer,
                                                    scorer: DistributedTransformer) -> None:
    prompt = prompt_of(n)
    continuation = list(generate(model, prompt, 12))
    assert len(continuation) == 12
    assert continuation == recomputed(scorer, prompt, continuation)


def test_stops_behind_the_first_of_the_tokens_that_end_a_text(model: DistributedTransformer) -> None:
    free = list(generate(model, PROMPT, 12))
    other = next(t for t in range(1003) if t not in free)
    for eos in ([free[4]], [other, free[4]], {free[0]}, (free[11],), [other]):
        ends = [i for i, token in enumerate(free) if token in eos]
        assert list(generate(model, PROMPT, 12, eos_token_ids=eos)) == free[:ends[0] + 1 if ends else 12]


def test_the_longest_sequence_is_a_limit(model: DistributedTransformer) -> None:
    free = list(generate(model, PROMPT, 12))
    assert list(generate(model, PROMPT, 12, max_seq_len=8)) == free[:5]
    assert list(generate(model, PROMPT, 12, max_seq_len=4)) == free[:1]
    assert list(generate(model, PROMPT, 5, max_seq_len=100)) == free[:5]


@pytest.mark.parametrize("arguments, says", [
    (dict(prompt=[]), "prompt is empty"),
    (dict(prompt=[3, 1003]), r"Token id 1003 is beyond the vocabulary: ids are 0 to 1002\."),
    (dict(prompt=[-1, 3]), r"Token id -1 is beyond the vocabulary: ids are 0 to 1002\."),
    (dict(max_new_tokens=0), "max_new_tokens must be at least 1; got 0"),
    (dict(prompt=[1] * 8, max_seq_len=8), "prompt has 8 tokens; the model takes at most 8.* Shorten it to 7 or fewer"),
    (dict(prompt=[1] * 80, max_seq_len=8), "prompt has 80 tokens; the model takes at most 8"),
])
def test_bad_input_is_refused_at_the_call(arguments: dict[str, Any], says: str, model: DistributedTransformer) -> None:
    with pytest.raises(ValueError, match=says):
        generate(**dict(model=model, prompt=PROMPT, max_new_tokens=3) | arguments)


def test_a_model_that_returns_more_logits_is_refused_at_the_call(scorer: DistributedTransformer) -> None:
    with pytest.raises(ValueError, match="LAST_TOKEN"):
        generate(scorer, PROMPT, 3)


def test_seeds(model: DistributedTransformer) -> None:
    def drawn(**params: float) -> list[int]:
        return list(generate(model, PROMPT, 12, sampling=SamplingParams(**params)))

    texts = [drawn(temperature=1.0, seed=seed) for seed in (0, 1, 2**32 - 1)]
    assert drawn(temperature=1.0, seed=1) == texts[1]
    assert len({*map(tuple, texts)}) == 3
    greedy = drawn(temperature=0)
    assert greedy not in texts
    assert drawn(temperature=1.0, top_k=1, seed=5) == drawn(temperature=1.0, top_p=1e-6, seed=6) == greedy
    assert len({*drawn(temperature=3e38)}) > 8  # draws of one text are independent of each other


@pytest.mark.slow
def test_devices_change_nothing(folder: Path, model: DistributedTransformer, devices: list[jax.Device]) -> None:
    """Eight devices pad the vocabulary to 1008; no draw may hit the padding, and none be another for it."""
    sharded = maxlike.load(folder, devices=devices)
    for sampling in (SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=1)):
        assert list(generate(sharded, PROMPT, 12, sampling=sampling)) == (
            list(generate(model, PROMPT, 12, sampling=sampling)))
    assert max(generate(sharded, PROMPT, 60, sampling=SamplingParams(temperature=1e9))) < 1003
    (logits,), _ = jax.eval_shape(lambda: sharded(np.array(PROMPT), None, None, np.array([0, 3])))
    assert logits.shape == (1, 1003)


def test_figures(model: DistributedTransformer) -> None:
    figures = Figures()
    list(generate(model, PROMPT, 12, figures=figures))
    assert figures.compile_s > 0 and figures.prefill_tok_s > 0 and figures.decode_tok_s > 0
    figures = Figures()
    list(generate(model, PROMPT, 1, figures=figures))
    assert figures.compile_s > 0 and figures.prefill_tok_s > 0 and figures.decode_tok_s == 0


def test_a_runner_steps_sequences_side_by_side(model: DistributedTransformer) -> None:
    """Three sequences in one cache, one of them standing still for a while, go as each does alone."""
    prompts = [PROMPT, prompt_of(4), [7, 7, 7]]
    alone = [list(generate(model, prompt, 12)) for prompt in prompts]
    runner = ModelRunner(model, 9, 3, 2)
    table = np.random.default_rng(0).permutation(9)[:6].astype(np.int32).reshape(3, 2)
    lengths = np.zeros(3, np.int32)
    together: list[list[int]] = [[], [], []]
    upcoming = [list(prompt) for prompt in prompts]
    for draw in range(14):
        new = [[] if s == 1 and draw in (3, 4) else part for s, part in enumerate(upcoming)]
        offsets = np.cumsum([0, *map(len, new)]).astype(np.int32)
        tokens = np.zeros(16, np.int32)
        tokens[:offsets[-1]] = [token for part in new for token in part]
        out = np.asarray(runner.step(tokens, offsets, lengths, table, SamplingParams(temperature=0), draw))
        lengths = lengths + np.diff(offsets)
        for s in range(3):
            if new[s]:
                upcoming[s] = [int(out[s])]
                together[s] += upcoming[s]
    assert [tokens[:12] for tokens in together] == alone
    assert [*runner.compiled] == [16]
