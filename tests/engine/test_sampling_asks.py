"""What a request may ask for beside limits: masks, penalties, edits, log-probabilities; all at once; the state."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import NamedSharding

from maxlike.engine.sampling import (
    CHUNK,
    Rows,
    Sampled,
    SlotState,
    _exponentials,
    clear_slot,
    empty_state,
    fill_slot,
    sample,
    score,
)
from maxlike.engine.sampling_params import MAX_EDITS, MAX_LOGPROBS
from tests.engine.sampling_reference import edits_of, kept_of, penalised, rows_of, words_of
from tests.tpu_compile import requires_libtpu, topology_mesh

V, SLOTS = 1003, 6
draw = jax.jit(sample)
clear, fill = jax.jit(clear_slot, donate_argnums=0), jax.jit(fill_slot, donate_argnums=0)


def entered(state: SlotState, slot: int, prompt: list[int], output: list[int],
            edits: list[tuple[int, float, int]] | None = None) -> SlotState:
    """The slot with this history, brought in as the engine does it, a chunk at a time."""
    state = clear(state, slot, *edits_of(edits or [], state.history.shape[1]))
    for start in range(0, len(prompt) + len(output), CHUNK):
        ids = (prompt + output)[start:start + CHUNK]
        n_prompt = min(max(len(prompt) - start, 0), CHUNK)
        state = fill(state, slot, np.pad(np.array(ids, np.int32), (0, CHUNK - len(ids))), n_prompt, len(ids))
    return state


def run(logits: np.ndarray, state: SlotState | None = None, mask: np.ndarray | None = None,
        **asked: Any) -> tuple[Sampled, SlotState]:
    """Up to 64 rows, filled up to 64 so that one program serves most tests."""
    R, vocab = logits.shape
    state = empty_state(SLOTS, vocab) if state is None else state
    mask = np.zeros((R, -(-vocab // 32)), np.uint32) if mask is None else mask

    def padded(array: np.ndarray) -> np.ndarray:
        return np.pad(array, [(0, 64 - R)] + [(0, 0)] * (array.ndim - 1))

    rows = Rows(*map(padded, rows_of(R, **asked)))
    sampled, state = draw(padded(logits.astype(np.float32)), rows, state, padded(mask))
    return Sampled(*(array[:R] for array in sampled)), state


def normal(R: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(R, V)) * 3).astype(np.float32)


# -- the state


def test_a_slot_is_filled_and_cleared_and_others_stay() -> None:
    rng = np.random.default_rng(0)
    histories = {slot: (rng.integers(0, V, n).tolist(), rng.integers(0, V, m).tolist())
                 for slot, (n, m) in {0: (3, 0), 2: (CHUNK, 5), 3: (CHUNK + 7, 2 * CHUNK), 5: (1, CHUNK - 1)}.items()}
    state = empty_state(SLOTS, V)
    for slot, history in [(3, ([1, 2, 3], [4, 4])), *histories.items()]:  # slot 3 had another request
        state = entered(state, slot, *history, edits=[(slot, 1.5, 9)])
    for slot in range(SLOTS):
        prompt, output = histories.get(slot, ([], []))
        np.testing.assert_array_equal(state.history[slot] >> 1, np.bincount(output, minlength=V))
        np.testing.assert_array_equal(state.history[slot] & 1, np.isin(np.arange(V), prompt))
        assert state.edit_ids[slot, 0] == (slot if slot in histories else V)
        assert (np.asarray(state.edit_ids[slot, 1:]) >= V).all()
    state = clear(state, 3, *edits_of([], V))
    assert not state.history[3].any() and state.edit_ids[3, 0] == V
    assert (state.history[2] >> 1).sum() == 5


def test_tokens_of_live_rows_are_counted() -> None:
    state = entered(empty_state(SLOTS, V), 4, [9], [7, 7])
    logits = np.zeros((4, V), np.float32)
    logits[np.arange(4), [7, 8, 9, 10]] = 1
    _, state = run(logits, state, slots=[4, 1, 2, SLOTS], live=[True, True, False, False])
    counts = np.zeros((SLOTS, V))
    counts[4, 7], counts[1, 8] = 3, 1
    np.testing.assert_array_equal(state.history >> 1, counts)


def test_the_state_is_changed_in_place() -> None:
    """No program copies `[slots, V]`, or takes memory that grows with the slots."""
    vocab, slots, R = 16003, 256, 4
    state = empty_state(slots, vocab)
    size = sum(array.nbytes for array in state)
    mask = np.zeros((R, -(-vocab // 32)), np.uint32)
    ids, edits = np.zeros(CHUNK, np.int32), edits_of([], vocab)
    programs = [
        jax.jit(sample, donate_argnums=2).lower(np.zeros((R, vocab), np.float32), rows_of(R), state, mask),
        jax.jit(clear_slot, donate_argnums=0).lower(state, 0, *edits),
        jax.jit(fill_slot, donate_argnums=0).lower(state, 0, ids, 0, 0),
    ]
    for program in programs:
        compiled = program.compile()
        memory = compiled.memory_analysis()
        assert memory.alias_size_in_bytes >= size
        assert memory.temp_size_in_bytes < 12 * R * vocab * 4 < size / 4
        assert not re.findall(rf"\w+\[{slots},{vocab}\]\S* copy\(", compiled.as_text())


@pytest.mark.slow
@requires_libtpu
def test_on_tpu_as_well() -> None:
    """256 rows of a large vocabulary, on four devices: it compiles, in place and with little memory beside."""
    mesh, R, slots, vocab = topology_mesh("v6e:2x2", {"model": 4}), 256, 256, 128_256
    replicated = NamedSharding(mesh, P())

    def step(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sample(*arguments)

    def described(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated), tree)

    state = described(jax.eval_shape(lambda: empty_state(slots, vocab)))
    logits, mask = np.zeros((R, vocab), np.float32), np.zeros((R, -(-vocab // 32)), np.uint32)
    lowered = jax.jit(step, donate_argnums=2).lower(described(logits), described(rows_of(R)), state, described(mask))
    memory = lowered.compile().memory_analysis()
    assert memory.alias_size_in_bytes >= sum(np.prod(x.shape) * x.dtype.itemsize for x in state)
    assert memory.temp_size_in_bytes < 8 * 64 * vocab * 4


# -- masks


@pytest.mark.parametrize("vocab", [12, 32, 33, V])
def test_masks_forbid(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = rng.normal(size=(64, vocab)).astype(np.float32)
    allowed = rng.random((64, vocab)) < 0.3
    allowed[np.arange(64), rng.integers(0, vocab, 64)] = True
    for temperature in (0, 1e30):
        masked, _ = run(logits, mask=words_of(allowed), masked=True, temperature=temperature)
        assert allowed[np.arange(64), masked.tokens].all()
    alone, _ = run(logits, mask=words_of(np.arange(vocab)[None] == np.full((64, 1), vocab - 1)), masked=True)
    assert (np.asarray(alone.tokens) == vocab - 1).all()
    half, _ = run(logits, mask=words_of(allowed), masked=np.arange(64) % 2 == 0)
    best = np.where(allowed, logits, -np.inf).argmax(-1)
    np.testing.assert_array_equal(half.tokens, np.where(np.arange(64) % 2 == 0, best, logits.argmax(-1)))


def test_a_mask_that_allows_nothing_ends_in_a_token() -> None:
    for asked in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_p": 0.5, "top_k": 3}):
        sampled, _ = run(normal(4), masked=True, logprobs=True, **asked)
        assert ((np.asarray(sampled.tokens) >= 0) & (np.asarray(sampled.tokens) < V)).all()
        assert np.isfinite(sampled.logprob).all()


# -- penalties


HISTORY = ([5, 6, 7, 8, 5], [7, 8, 9, 9, 9, 1002])


@pytest.mark.parametrize("repetition, frequency, presence", [
    (1.5, 0, 0), (0.7, 0, 0), (1, 0.9, 0), (1, -0.5, 0), (1, 0, 1.5), (1, 0, -2), (1.3, 0.4, -0.6), (1e9, 2, 2),
])
def test_penalties(repetition: float, frequency: float, presence: float) -> None:
    # Whether a token is penalised by just so much is seen where another overtakes it, or not.
    state = entered(empty_state(SLOTS, V), 1, *HISTORY)
    penalties = dict(repetition=repetition, frequency=frequency, presence=presence)
    rival, rows, expected = 900, [], []
    for id in (4, 5, 6, 7, 8, 9, 1002):
        for logit in (4.0, -4.0):
            row = np.full(V, -1e30)
            row[id] = logit
            after = penalised(row, *HISTORY, **penalties)[id]
            for step, token in ((-1e-3, id), (1e-3, rival)):
                row[rival] = after + step * max(1, abs(after))
                rows.append(row.copy())
                expected.append(token)
    sampled, _ = run(np.stack(rows), state, slots=1, **penalties)
    np.testing.assert_array_equal(sampled.tokens, expected)


def test_penalties_follow_what_is_drawn() -> None:
    """Each token is drawn twice when three times would cost more than the next one."""
    logits = np.full((1, V), -1e3, np.float32)
    logits[0, :4] = [3.0, 2.9, 2.8, 2.7]
    state, tokens = empty_state(SLOTS, V), []
    for number in range(8):
        sampled, state = run(logits, state, slots=0, frequency=0.06, draw=number)
        tokens.append(int(sampled.tokens[0]))
    history: list[int] = []
    for _ in range(8):
        history.append(int(penalised(logits[0], [], history, 1, 0.06, 0).argmax()))
    assert tokens == history and len(set(history)) > 2


def test_rows_without_penalties_see_none() -> None:
    state = entered(empty_state(SLOTS, V), 1, *HISTORY)
    logits = normal(4)
    logits[:, 9] = 100
    sampled, _ = run(logits, state, slots=1, presence=[0, 2, 0, 0], frequency=[0, 2, 0, 2], repetition=[1, 99, 1, 99],
                     live=[True, True, True, False])
    assert np.asarray(sampled.tokens)[[0, 2]].tolist() == [9, 9] and sampled.tokens[1] != 9


# -- edits


def test_edits_add_and_forbid_until_their_draw() -> None:
    logits = np.full((1, V), -50.0)
    logits[0, [10, 20, 30]] = [3, 2, 1]
    edits = [(10, -np.inf, 2), (30, 1.5, 2**31 - 1), (20, 0.7, 5), (20, 0.7, 5), (V, 1e9, 9), (V + 5, 1e9, 9)]
    state = entered(empty_state(SLOTS, V), 3, [], [], edits)
    state = entered(state, 2, [], [], [(40, 1e9, 9)])
    for number, token in ((0, 20), (1, 20), (2, 20), (4, 20), (5, 10), (6, 10), (10**6, 10)):
        assert run(logits, state, slots=3, edited=True, draw=number)[0].tokens[0] == token, number
    assert run(logits, state, slots=3, edited=False)[0].tokens[0] == 10
    assert run(logits, state, slots=2, edited=True)[0].tokens[0] == 40
    assert run(logits, state, slots=SLOTS, edited=True, live=False)[0].tokens[0] == 10


def test_all_edits_of_a_slot_apply() -> None:
    ids = np.random.default_rng(0).permutation(V)[:MAX_EDITS]
    state = entered(empty_state(SLOTS, V), 0, [], [], [(int(id), -np.inf, 1) for id in ids])
    logits = np.zeros((64, V))
    logits[:, ids] = 5
    tokens = np.asarray(run(logits, state, slots=0, edited=True, temperature=1)[0].tokens)
    assert not np.isin(tokens, ids).any() and len(np.unique(tokens)) > 50


# -- log-probabilities


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def assert_logprobs(sampled: Any, logits: np.ndarray) -> None:
    tokens, at = np.asarray(sampled.tokens), np.arange(len(logits))
    logprobs, n = log_softmax(logits), min(MAX_LOGPROBS, logits.shape[1])
    np.testing.assert_allclose(sampled.logprob, logprobs[at, tokens], rtol=1e-6, atol=2e-6)
    np.testing.assert_array_equal(sampled.rank, 1 + (logits > logits[at, tokens][:, None]).sum(-1))
    np.testing.assert_array_equal(sampled.top_ids, np.argsort(-logits, axis=-1, kind="stable")[:, :n])
    np.testing.assert_allclose(sampled.top_logprobs, np.take_along_axis(logprobs, np.asarray(sampled.top_ids), -1),
                               rtol=1e-6, atol=2e-6)
    assert (sampled.logprob.dtype, sampled.rank.dtype, sampled.top_ids.dtype) == (jnp.float32, jnp.int32, jnp.int32)


@pytest.mark.parametrize("vocab", [12, V, 50_021])
def test_logprobs_are_the_models_own(vocab: int) -> None:
    rng = np.random.default_rng(vocab)
    logits = (rng.normal(size=(8, vocab)) * 4).astype(np.float32)
    logits[1], logits[2] = np.round(logits[1]), 0  # ties
    logits[3] += 3000
    state = entered(empty_state(SLOTS, vocab), 0, [3], [4, 4], [(5, 30.0, 9)])
    asked = dict(slots=0, repetition=2, frequency=1, edited=True, masked=True, temperature=[0, 2] * 4, top_k=9)
    sampled, _ = run(logits, state, words_of(rng.random((8, vocab)) < 0.5), logprobs=True, **asked)
    assert (np.asarray(sampled.tokens) != logits.argmax(-1)).any()
    assert_logprobs(sampled, logits)
    some, _ = run(logits, state, words_of(rng.random((8, vocab)) < 0.5), logprobs=np.arange(8) == 5, **asked)
    np.testing.assert_allclose(some.logprob[5], log_softmax(logits)[5, some.tokens[5]], rtol=1e-6)


def test_logprobs_that_nobody_asks_for_are_zeros() -> None:
    for asked in ({}, {"live": False, "logprobs": True}):
        sampled, _ = run(normal(8), temperature=1, **asked)
        assert not any(np.asarray(array).any() for array in sampled[1:])
        assert sampled.top_ids.shape == sampled.top_logprobs.shape == (8, MAX_LOGPROBS)


def test_score() -> None:
    logits = normal(64)
    logits[1], logits[2] = np.round(logits[1]), 0
    targets = np.random.default_rng(1).integers(0, V, 64).astype(np.int32)
    targets[:2] = 0, V - 1
    scored = jax.jit(score)(logits, targets)
    np.testing.assert_array_equal(scored.tokens, targets)
    assert_logprobs(scored, logits)


def test_logprobs_of_tokens_that_cannot_be() -> None:
    logits = normal(2)
    logits[0, 5], logits[1] = -np.inf, np.where(np.arange(V) % 2, -np.inf, np.inf)
    scored = score(jnp.asarray(logits), jnp.array([5, 6]))
    assert scored.logprob[0] == -np.inf and scored.rank.tolist() == [V, 1]
    np.testing.assert_allclose(scored.logprob[1], -np.log(502), rtol=1e-6)


# -- all at once


def test_everything_at_once() -> None:
    """Rows that ask for any mixture: the tokens are those of a race run in float64 with the same random numbers."""
    R, n_slots = 512, SLOTS
    rng = np.random.default_rng(7)

    def often(plain: Any, *others: Any) -> np.ndarray:
        return np.where(rng.random(R) < 0.4, plain, rng.choice(others, R))

    logits = (rng.normal(size=(R, V)) * 4).astype(np.float32)
    logits[::7] = np.round(logits[::7])  # ties
    asked = dict(
        slots=np.arange(R) % n_slots, temperature=often(0, 0.3, 1, 2.5), top_k=often(0, 1, 20, 500, 5000),
        top_p=often(1, 0.3, 0.9, 0.999).astype(np.float32), min_p=often(0, 0.02, 0.3).astype(np.float32),
        repetition=often(1, 0.8, 1.2, 3).astype(np.float32), frequency=often(0, -0.5, 1.5),
        presence=often(0, -2, 0.5), draw=rng.integers(0, 20, R), live=rng.random(R) < 0.95,
        edited=rng.random(R) < 0.5, masked=rng.random(R) < 0.5)
    seeds = rng.integers(0, 2**32, (R, 2), dtype=np.uint32)
    allowed = rng.random((R, V)) < rng.choice([0.01, 0.5, 0.99], (R, 1))
    state, histories = empty_state(n_slots, V), []
    for slot in range(n_slots):
        prompt, output = (rng.integers(0, V, rng.integers(0, 300)).tolist() for _ in range(2))
        edits = [(int(id), float(rng.choice([-np.inf, -100, -1, 2, 9])), int(rng.integers(0, 20)))
                 for id in rng.integers(0, V + 3, 300)]
        histories.append((prompt, output, edits))
        state = entered(state, slot, prompt, output, edits)
    noise = np.asarray(_exponentials(jnp.asarray(seeds), jnp.asarray(asked["draw"]), V), np.float64)

    def expected(row: int) -> int | None:
        """The token, or `None` where the two best are too close to tell."""
        ask = {name: values[row] for name, values in asked.items()}
        prompt, output, edits = histories[ask["slots"]]
        x = np.where(allowed[row] | ~ask["masked"], logits[row].astype(np.float64), -np.inf)
        x = penalised(x, prompt, output, ask["repetition"], ask["frequency"], ask["presence"])
        for id, value, until in edits:
            if ask["edited"] and ask["draw"] < until and id < V:
                x[id] += value
        if ask["temperature"] == 0:
            ids = np.argsort(-x, kind="stable")
            times = -x[ids[:2]]
            return None if 0 < times[1] - times[0] < 1e-5 else int(ids[0])
        ids, weights = kept_of(x, ask["temperature"], ask["top_k"], ask["top_p"], ask["min_p"])
        times = noise[row][ids] / np.maximum(weights, 1e-300)
        best = np.sort(times)
        return None if len(best) > 1 and best[1] < best[0] * (1 + 1e-4) else int(ids[times.argmin()])

    mask = words_of(allowed)
    tokens = np.concatenate([
        run(logits[some], state, mask[some], seed=seeds[some], **{name: a[some] for name, a in asked.items()})[0].tokens
        for some in np.split(np.arange(R), R // 64)])
    tokens_expected = [expected(row) for row in range(R)]
    wrong = [row for row in range(R)
             if asked["live"][row] and tokens_expected[row] not in (None, tokens[row])]
    assert not wrong, [(row, tokens[row], tokens_expected[row]) for row in wrong]
    assert tokens_expected.count(None) < R / 100


def test_against_transformers() -> None:
    """Its processors in the order of its `generate`, and the same random numbers on what they leave."""
    torch = pytest.importorskip("torch")
    generation = pytest.importorskip("transformers.generation.logits_process")
    R = 48
    rng = np.random.default_rng(3)
    logits, prompt = normal(R, 3), rng.integers(0, V, 40)
    state = entered(empty_state(SLOTS, V), 0, prompt.tolist(), [])
    seeds = rng.integers(0, 2**32, (R, 2), dtype=np.uint32)
    noise = np.asarray(_exponentials(jnp.asarray(seeds), jnp.zeros(R, jnp.int32), V), np.float64)
    for ask in (dict(temperature=0.6, top_k=20, top_p=0.95), dict(temperature=1.3, min_p=0.05, repetition=1.2),
                dict(temperature=2.0, top_k=400, top_p=0.7, min_p=0.01, repetition=0.9), dict(temperature=1.0)):
        chain = generation.LogitsProcessorList([generation.RepetitionPenaltyLogitsProcessor(ask.get("repetition", 1.0)),
                                                generation.TemperatureLogitsWarper(ask["temperature"])])
        if "top_k" in ask:
            chain.append(generation.TopKLogitsWarper(ask["top_k"]))
        if "top_p" in ask:
            chain.append(generation.TopPLogitsWarper(ask["top_p"]))
        if "min_p" in ask:
            chain.append(generation.MinPLogitsWarper(ask["min_p"]))
        history = torch.tensor(np.tile(prompt, (R, 1)))
        left = chain(history, torch.tensor(logits.copy())).softmax(-1).numpy()
        sampled, _ = run(logits, state, seed=seeds, slots=0, **ask)
        np.testing.assert_array_equal(sampled.tokens, (left / noise).argmax(-1), err_msg=str(ask))
