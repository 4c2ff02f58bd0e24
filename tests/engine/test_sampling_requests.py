"""All that a request may ask of sampling beside its limits, alone and together, and what is remembered of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlike.engine import sampling
from maxlike.engine.sampling import (
    CHUNK,
    Rows,
    Sampled,
    SlotState,
    empty_state,
    greedy,
    score,
)
from maxlike.engine.sampling_params import MAX_EDITS, MAX_LOGPROBS
from tests.engine.drawing import DEFAULTS, Asked, all_allowed, draw_all, enter, pack, rows_of, run

R, V = 128, 1003  # V is no multiple of 32
INFINITE = 2**30
FEATURES = ("mask", "repetition", "frequency", "presence", "edits", "top_k", "top_p", "min_p", "temperature")


def some(rng: np.random.Generator, features: set[str]) -> Asked:
    """A row that asks for these features, and may be greedy where it asks for a temperature."""
    logits = rng.normal(size=V).astype(np.float32) * 3 - rng.choice(np.float32([0, 5, 20]))
    likely = np.argsort(-logits)[:60]
    asked = Asked(logits, draw=int(rng.integers(100)), seed=int(rng.integers(-(2**63), 2**63 - 1)),
                  prompt=rng.choice([*likely, *range(V)], rng.integers(300)).tolist(),
                  output=rng.choice(likely, rng.integers(1, 300)).tolist())
    if "mask" in features:
        asked.allowed = rng.random(V) < rng.choice([0.02, 0.5, 0.9])
        asked.allowed[rng.integers(V)] = True
    for name, low, high in (("repetition", 0.5, 2), ("frequency", -0.5, 1), ("presence", -2, 2), ("min_p", 0, 0.3),
                            ("top_p", 0.2, 1), ("temperature", 0.3, 3)):
        if name in features:
            setattr(asked, name, float(np.float32(rng.uniform(low, high))))
    if "temperature" in features and rng.integers(3) == 0:
        asked.temperature = 0.0
    if "top_k" in features:
        asked.top_k = int(rng.choice([1, 2, 17, 300, V, 2**31 - 1]))
    if "edits" in features:
        asked.edits = [(int(token), float(rng.choice([-np.inf, -100, 2.5, 100])), int(rng.choice([50, INFINITE])))
                       for token in rng.choice(likely, rng.integers(1, 20), replace=False)]
    return asked


def log(probabilities: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log(probabilities)


@pytest.mark.parametrize("features", [*((name,) for name in FEATURES), ("repetition", "frequency", "presence"),
                                      ("top_k", "top_p", "min_p"), ("mask", "edits"), FEATURES, "each its own"],
                         ids=lambda features: features if isinstance(features, str) else "+".join(features))
def test_each_token_is_the_plain_draw_from_the_distribution_asked_for(features: Any) -> None:
    """A draw of the same seed from the distribution as numpy has it, handed over as logits, gives the same token."""
    rng = np.random.default_rng(sum(map(ord, "".join(features))))
    asked = [some(rng, {name for name in FEATURES if rng.integers(2)} if features == "each its own" else {*features})
             for _ in range(R)]
    tokens = np.asarray(draw_all(asked)[0].tokens)
    distributions = [one.distribution() for one in asked]
    plainly = [Asked(log(p), draw=one.draw, seed=one.seed) for one, p in zip(asked, distributions, strict=True)]
    np.testing.assert_array_equal(tokens, draw_all(plainly)[0].tokens)
    assert all(p[token] > 0 for p, token in zip(distributions, tokens, strict=True))
    bare = [Asked(one.logits, draw=one.draw, seed=one.seed) for one in asked]
    assert (tokens != draw_all(bare)[0].tokens).mean() > 0.05, "what is asked makes no difference"


def with_processors(one: Asked) -> np.ndarray:
    """The distribution that transformers draws from."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    processors = transformers.LogitsProcessorList([transformers.RepetitionPenaltyLogitsProcessor(one.repetition)])
    if one.temperature == 0:
        scores = processors(torch.tensor([[*one.prompt, *one.output]]), torch.tensor(one.logits)[None])
        return np.eye(V)[int(scores.argmax())]
    processors.append(transformers.TemperatureLogitsWarper(one.temperature))
    if one.top_k:
        processors.append(transformers.TopKLogitsWarper(one.top_k))
    if one.top_p < 1:
        processors.append(transformers.TopPLogitsWarper(one.top_p))
    if one.min_p:
        processors.append(transformers.MinPLogitsWarper(one.min_p))
    scores = processors(torch.tensor([[*one.prompt, *one.output]]), torch.tensor(one.logits, dtype=torch.float64)[None])
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.parametrize("features", [("repetition",), ("top_k",), ("top_p",), ("min_p",), ("temperature",),
                                      ("repetition", "top_k", "top_p", "min_p", "temperature")], ids="+".join)
def test_each_token_is_the_plain_draw_from_the_distribution_of_transformers(features: tuple[str, ...]) -> None:
    rng = np.random.default_rng(len(features[0]))
    asked = [some(rng, {*features}) for _ in range(R)]
    theirs = [Asked(log(with_processors(one)), draw=one.draw, seed=one.seed) for one in asked]
    np.testing.assert_array_equal(draw_all(asked)[0].tokens, draw_all(theirs)[0].tokens)


def test_a_row_is_drawn_alike_whatever_stands_beside_it_and_wherever() -> None:
    rng = np.random.default_rng(5)
    asked = [some(rng, {name for name in FEATURES if rng.integers(2)}) for _ in range(R)]
    tokens = np.asarray(draw_all(asked)[0].tokens)
    order = rng.permutation(R)
    np.testing.assert_array_equal(draw_all([asked[i] for i in order])[0].tokens, tokens[order])
    for n in (1, 6):  # a row at a time, and two
        for start in (0, 60):
            np.testing.assert_array_equal(draw_all(asked[start:start + n])[0].tokens, tokens[start:start + n])


def test_on_other_devices_than_the_cpu_all_rows_at_once_come_to_the_same() -> None:
    rng = np.random.default_rng(6)
    asked = [some(rng, {name for name in FEATURES if rng.integers(2)}) for _ in range(R)]

    @jax.jit
    def at_once(logits: jax.Array, rows: Rows, state: SlotState, mask: jax.Array) -> tuple[Sampled, SlotState]:
        return sampling._sample(logits, Rows(*map(jnp.asarray, rows)), state, mask), state

    for mine, theirs in zip(draw_all(asked, logprobs=True)[0], draw_all(asked, logprobs=True, program=at_once)[0],
                            strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-5 * (mine.dtype == np.float32))


def test_tokens_forbidden_and_allowed() -> None:
    """Each token alone; the bits behind the last one, and rows that look at no mask, change nothing."""
    allowed = np.eye(V, dtype=bool)
    for start in range(0, V, R):
        tokens = (np.arange(R) + start) % V
        mask = pack(allowed[tokens])
        mask[::2, -1] |= np.uint32(0xFFFFFFFF << V % 32 & 0xFFFFFFFF)
        logits = np.random.default_rng(start).normal(size=(R, V)).astype(np.float32)
        masked, temperature = np.arange(R) % 5 > 0, np.arange(R) % 3 / 2
        rows = rows_of(R, masked=masked, temperature=np.where(masked, temperature, 0), top_k=3, top_p=0.9)
        drawn = run(logits, rows, empty_state(R, V), mask)[0].tokens
        np.testing.assert_array_equal(drawn, np.where(masked, tokens, logits.argmax(-1)))


def test_where_nothing_is_allowed_any_token_comes_and_it_is_the_same_each_time() -> None:
    logits = np.random.default_rng(3).normal(size=(R, V)).astype(np.float32)
    rows = rows_of(R, masked=True, temperature=np.arange(R) % 2, seed=list(range(R)), top_p=0.5, top_k=9)
    drawn = np.asarray(run(logits, rows, empty_state(R, V), np.zeros_like(all_allowed(R, V)))[0].tokens)
    assert ((drawn >= 0) & (drawn < V)).all()
    assert len(np.unique(drawn)) == 1


def test_edits_add_up_and_end() -> None:
    logits = np.zeros(V, np.float32)
    logits[:4] = 4, 3, 2, 1
    forbid, favour = (0, -np.inf, 3), [(2, 1.5, INFINITE), (2, 1.0, INFINITE)]
    asked = [Asked(logits, temperature=0.0, draw=draw, edits=edits) for edits in ([forbid], favour, [forbid, *favour])
             for draw in (0, 2, 3, 4)]
    many = [(token, -np.inf, INFINITE) for token in range(MAX_EDITS)]
    asked += [Asked(logits, temperature=0.0, edits=many), Asked(np.roll(logits, 999), temperature=0.0, edits=many)]
    asked += [Asked(logits, temperature=0.0)] * (R - len(asked))
    tokens = draw_all(asked)[0].tokens
    np.testing.assert_array_equal(tokens[:14], [1, 1, 0, 0, 2, 2, 2, 2, 2, 2, 2, 2, MAX_EDITS, 999])
    assert (tokens[14:] == 0).all()


def test_only_rows_that_ask_look_at_their_slots_history_and_edits() -> None:
    state = empty_state(R, V)
    for slot in (0, 1):
        state = enter(state, slot, [5] * 9, [6] * 9, [(7, -np.inf, INFINITE)])
    logits = np.zeros((R, V), np.float32)
    logits[:, 5:9] = 4, 5, 6, 3
    slots = np.arange(R) % 2
    for asked, token in ((dict(), 7), (dict(edited=True), 6), (dict(edited=True, presence=2.0), 5),
                         (dict(edited=True, repetition=2.0), 8), (dict(frequency=0.5), 7)):
        rows = rows_of(R, slots=slots, temperature=0,
                       **{name: np.where(slots, value, DEFAULTS[name]) for name, value in asked.items()})
        tokens = run(logits, rows, state, all_allowed(R, V))[0].tokens
        np.testing.assert_array_equal(tokens, np.where(slots, token, 7))


def test_penalties_follow_the_output_as_it_grows() -> None:
    """Drawn tokens count for the next draw, in their own slot."""
    rng = np.random.default_rng(7)
    asked = [some(rng, {"repetition", "frequency", "presence", "temperature"}) for _ in range(R)]
    for one in asked:
        one.frequency = abs(one.frequency)
    state = empty_state(R, V)
    for slot, one in enumerate(asked):
        state = enter(state, slot, one.prompt, one.output)
    for _ in range(4):
        rows = rows_of(R, slots=np.arange(R), seed=[one.seed for one in asked], draw=[one.draw for one in asked],
                       **{name: [getattr(one, name) for one in asked]
                          for name in ("repetition", "frequency", "presence", "temperature")})
        sampled, state = run(np.stack([one.logits for one in asked]), rows, state, all_allowed(R, V))
        plainly = [Asked(log(one.distribution()), draw=one.draw, seed=one.seed) for one in asked]
        np.testing.assert_array_equal(sampled.tokens, draw_all(plainly)[0].tokens)
        for one, token in zip(asked, np.asarray(sampled.tokens).tolist(), strict=True):
            one.output, one.draw = [*one.output, token], one.draw + 1


def counts_of(tokens: list[int]) -> np.ndarray:
    return np.bincount(np.array(tokens, np.int64), minlength=V)


@pytest.mark.parametrize("n_prompt, n_output", [(0, 0), (1, 0), (0, 1), (CHUNK, 0), (CHUNK, CHUNK), (CHUNK - 1, 2),
                                                (2 * CHUNK + 3, 700), (700, 2 * CHUNK)])
def test_a_slot_knows_the_request_that_entered_it_last(n_prompt: int, n_output: int) -> None:
    rng = np.random.default_rng(n_prompt)
    state = empty_state(R, V)
    for slot in range(3):
        state = enter(state, slot, [slot, 500], [slot, slot, 600], [(slot, 1.0, 1)])
    # Drawn from few, so that they repeat, and never the last, with which chunks are filled up.
    prompt, output = rng.integers(V - 800, V - 1, n_prompt).tolist(), rng.integers(20, size=n_output).tolist()
    edits = [(3, -np.inf, 7), (V - 1, 2.5, INFINITE)]
    state = enter(state, 1, prompt, output, edits)
    np.testing.assert_array_equal(state.counts[1], counts_of(output))
    np.testing.assert_array_equal(state.in_prompt[1], counts_of(prompt) > 0)
    np.testing.assert_array_equal(state.edit_ids[1], [3, V - 1] + [V] * (MAX_EDITS - 2))
    np.testing.assert_array_equal(state.edit_values[1, :2], np.float32([-np.inf, 2.5]))
    np.testing.assert_array_equal(state.edit_until[1, :2], [7, INFINITE])
    for slot in (0, 2):
        np.testing.assert_array_equal(state.counts[slot], counts_of([slot, slot, 600]))
        np.testing.assert_array_equal(state.in_prompt[slot], counts_of([slot, 500]) > 0)
        assert (state.edit_ids[slot, 0], state.edit_values[slot, 0], state.edit_until[slot, 0]) == (slot, 1, 1)


def test_tokens_of_live_rows_are_counted() -> None:
    """Padding is not, wherever it points, and asks for nothing."""
    rng = np.random.default_rng(8)
    state = enter(empty_state(R, V), 4, output=[9, 9])
    logits = rng.normal(size=(R, V)).astype(np.float32)
    live = rng.random(R) < 0.6
    slots = np.where(live, rng.permutation(R), rng.choice([3, R, 2**31 - 1], R))
    rows = rows_of(R, slots=slots, live=live, seed=list(range(R)), repetition=np.where(live, 1, 0), masked=~live,
                   edited=~live, temperature=np.where(live, 1, np.nan))
    sampled, after = run(logits, rows, state, np.zeros_like(all_allowed(R, V)))
    expected = np.asarray(state.counts).copy()
    expected[slots[live], np.asarray(sampled.tokens)[live]] += 1
    np.testing.assert_array_equal(after.counts, expected)
    np.testing.assert_array_equal(after.in_prompt, state.in_prompt)
    alone = rows_of(R, slots=np.where(live, slots, R), live=True, seed=list(range(R)))
    plain = run(logits, alone, empty_state(R, V), all_allowed(R, V))[0].tokens
    np.testing.assert_array_equal(sampled.tokens[live], plain[live])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    x = np.asarray(logits, np.float64)
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def assert_reported(sampled: Sampled, logits: np.ndarray) -> None:
    """What is reported of the tokens is what numpy finds."""
    tokens, expected = np.asarray(sampled.tokens), log_softmax(logits)
    rows = np.arange(len(logits))
    np.testing.assert_allclose(sampled.logprob, expected[rows, tokens], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(sampled.rank, 1 + (logits > logits[rows, tokens][:, None]).sum(-1))
    order = np.argsort(-logits, axis=-1, kind="stable")[:, :MAX_LOGPROBS]
    np.testing.assert_array_equal(sampled.top_ids, order)
    np.testing.assert_allclose(sampled.top_logprobs, np.take_along_axis(expected, order, -1), rtol=1e-5, atol=1e-5)
    dtypes = [leaf.dtype for leaf in sampled]
    assert dtypes == [jnp.int32, jnp.float32, jnp.int32, jnp.int32, jnp.float32]


def test_logprobs_are_the_models_own() -> None:
    rng = np.random.default_rng(9)
    asked = [some(rng, {*FEATURES}) for _ in range(R)]
    for one in asked[::2]:
        one.logits = np.round(one.logits)  # ties
    sampled, _ = draw_all(asked, logprobs=True)
    assert_reported(sampled, np.stack([one.logits for one in asked]))
    assert len(np.unique(sampled.rank)) > 10
    for of_unasked, of_asked in zip(draw_all(asked)[0], sampled, strict=True):
        assert (of_unasked.shape, of_unasked.dtype) == (of_asked.shape, of_asked.dtype)
    np.testing.assert_array_equal(draw_all(asked)[0].tokens, sampled.tokens)


@pytest.mark.parametrize("size", [V, 7])
def test_score(size: int) -> None:
    rng = np.random.default_rng(10)
    logits = (rng.normal(size=(64, size)) * 5).astype(np.float32)
    logits[::3] = np.round(logits[::3])
    logits[1] *= 1e30
    logits[2, :size // 2] = -np.inf
    targets = rng.integers(size, size=64).astype(np.int32)
    targets[2] = size - 1
    scored = jax.jit(score)(logits, targets)
    np.testing.assert_array_equal(scored.tokens, targets)
    assert_reported(scored, logits)


def test_score_of_infinite_logits() -> None:
    logits = np.float32([[1, -np.inf, 2], [np.inf, 0, 1], [-np.inf] * 3])
    scored = jax.jit(score)(logits, np.int32([1, 0, 0]))
    np.testing.assert_array_equal(scored.rank, [3, 1, 1])
    assert scored.logprob[0] == -np.inf and scored.logprob[1] == 0
    assert not np.isnan(np.asarray(scored.top_logprobs)).any()


def test_greedy() -> None:
    rng = np.random.default_rng(11)
    logits = rng.integers(5, size=(64, 40)).astype(np.float32) - 2
    logits[0], logits[1], logits[2, 7], logits[3, 39] = -np.inf, np.inf, np.inf, 9
    logits[4:8] = np.where(rng.integers(2, size=(4, 40)), 0.0, -0.0)
    np.testing.assert_array_equal(jax.jit(greedy)(logits), logits.argmax(-1))
    of_nan = jax.jit(greedy)(np.float32([[1, np.nan, 2], [np.nan] * 3]))
    assert ((of_nan >= 0) & (of_nan < 3)).all()
    wide = np.zeros((2, 262_145), np.float32)
    wide[0, -1], wide[1, -2:] = 1, 1
    np.testing.assert_array_equal(jax.jit(greedy)(wide), [262_144, 262_143])
