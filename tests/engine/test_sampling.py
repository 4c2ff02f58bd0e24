"""Draws against the distribution written out in numpy, limits against a sort, seeds against each other."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

from maxlike.engine.sampling import (
    SlotState,
    _exponentials,
    _ordered,
    _sample,
    _top_k,
    _top_p,
    empty_state,
    greedy,
    sample,
    seed_words,
)
from tests.engine.sampling_reference import distribution, kept_of, rows_of

N = 20_000  # draws of each distribution
NO = -np.inf
ROWS = {
    "plain": [1.0, -0.5, 2.0, 0.3, -3.0, 1.9, 0.0, -1.0, 2.5, 0.7, -0.2, 1.2],
    "ties": [1.0, 2.0, 2.0, 0.0, 1.0, 2.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0],
    "masked": [NO, 1.0, NO, NO, 0.5, NO, NO, 0.0, NO, NO, -1.0, NO],
}
draw = jax.jit(sample)


def tokens_of(logits: Any, seed: Any = None, **asked: Any) -> np.ndarray:
    """A token for each row of logits."""
    R, V = np.shape(logits)
    sampled, _ = draw(jnp.asarray(logits, jnp.float32), rows_of(R, seed, **asked), empty_state(1, V),
                      jnp.zeros((R, -(-V // 32)), jnp.uint32))
    assert sampled.tokens.dtype == jnp.int32
    return np.asarray(sampled.tokens)


def tile(values: Any, n: int = N) -> np.ndarray:
    return np.tile(np.asarray(values, np.float32), (n, 1))


def assert_drawn_from(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any(), "drawn beyond the limits"
    deviation = np.sqrt(expected * (1 - expected) / len(tokens))
    assert (np.abs(counts / len(tokens) - expected) <= 5 * deviation + 1e-12).all(), (counts / len(tokens), expected)


# -- distributions


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [
    (1.0, 0, 1.0, 0.0), (0.4, 0, 1.0, 0.0), (3.0, 0, 1.0, 0.0), (1.0, 1, 1.0, 0.0), (1.0, 3, 1.0, 0.0),
    (1.0, 12, 1.0, 0.0), (1.0, 1000, 1.0, 0.0), (1.0, 0, 0.9, 0.0), (1.0, 0, 0.45, 0.0), (1.0, 0, 0.01, 0.0),
    (3.0, 0, 0.6, 0.0), (1.0, 5, 0.7, 0.0), (0.7, 2, 0.99, 0.0), (1.0, 0, 1.0, 0.2), (2.0, 0, 1.0, 0.2),
    (1.0, 0, 1.0, 1.0), (1.0, 4, 1.0, 0.1), (1.5, 5, 0.8, 0.3),
])
@pytest.mark.parametrize("row", ROWS)
def test_draws_follow_the_distribution(row: str, temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    limits = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_drawn_from(tokens_of(tile(ROWS[row]), **limits), distribution(ROWS[row], **limits))


def test_top_p_ends_with_the_token_that_reaches_it() -> None:
    halves = np.log2([2.0, 1.0, 0.5, 0.5]) * np.log(2)  # probabilities 1/2, 1/4, 1/8, 1/8
    halves = np.pad(halves, (0, 8), constant_values=-np.inf)
    for top_p, kept in ((0.49, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.75, 2), (0.76, 3), (0.9, 4), (1.0, 4)):
        assert len(np.unique(tokens_of(tile(halves), temperature=1, top_p=top_p))) == kept, top_p


def test_among_equals_limits_take_the_first_and_as_many_as_they_say() -> None:
    equal = tile([0.5] * 12)
    assert np.unique(tokens_of(equal, temperature=1, top_k=5)).tolist() == [0, 1, 2, 3, 4]
    assert np.unique(tokens_of(equal, temperature=1, top_p=0.4)).tolist() == [0, 1, 2, 3, 4]  # four have but 1/3
    assert np.unique(tokens_of(equal, temperature=1, top_k=10, top_p=0.5)).tolist() == [0, 1, 2, 3, 4]
    assert np.unique(tokens_of(equal, temperature=1, min_p=1)).tolist() == list(range(12))
    assert np.unique(tokens_of(equal, temperature=1)).tolist() == list(range(12))


def test_temperature_0_is_greedy_whatever_else_is_asked() -> None:
    logits = np.random.default_rng(0).normal(size=(N, 12))
    for limits in ({}, {"top_k": 5}, {"top_p": 0.3}, {"min_p": 0.5}, {"draw": 7}):
        np.testing.assert_array_equal(tokens_of(logits, temperature=0, **limits), logits.astype(np.float32).argmax(-1))
    assert (tokens_of(tile(ROWS["ties"]), temperature=0) == 1).all()  # the first of the likeliest
    np.testing.assert_array_equal(jax.jit(greedy)(logits.astype(np.float32)), logits.astype(np.float32).argmax(-1))


def test_every_row_has_its_own_parameters() -> None:
    rows, quarter = tile(ROWS["plain"]), np.arange(N) % 4
    limits = dict(temperature=[0, 1, 0.5, 2], top_k=[0, 0, 3, 0], top_p=[0.1, 0.7, 1, 1], min_p=[0, 0, 0, 0.4])
    tokens = tokens_of(rows, **{name: np.array(values)[quarter] for name, values in limits.items()})
    assert (tokens[quarter == 0] == 8).all()
    for i in (1, 2, 3):
        expected = distribution(ROWS["plain"], **{name: values[i] for name, values in limits.items()})
        assert_drawn_from(tokens[quarter == i], expected)


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-44])
@pytest.mark.parametrize("sign", [1, -1])
def test_temperatures_near_0_are_greedy(temperature: float, sign: int) -> None:
    """Even where logits divided by them are infinite."""
    logits = 10 * np.random.default_rng(1).permuted(np.tile(np.arange(12.0) + 1, (N, 1)), axis=1)
    for limits in ({}, {"top_k": 3, "top_p": 0.9, "min_p": 0.1}):
        tokens = tokens_of(sign * logits, temperature=temperature, **limits)
        np.testing.assert_array_equal(tokens, (sign * logits).argmax(-1))


@pytest.mark.parametrize("temperature", [1e30, 3.4e38])
def test_high_temperatures_are_uniform(temperature: float) -> None:
    assert_drawn_from(tokens_of(tile(ROWS["plain"]), temperature=temperature), np.full(12, 1 / 12))
    assert_drawn_from(tokens_of(tile(ROWS["plain"]), temperature=temperature, top_k=4),  # the likeliest as before
                      distribution(ROWS["plain"], 1e30, 4))


def test_infinite_logits() -> None:
    row = [0.0, np.inf, 1.0, NO, np.inf, 80.0]
    assert_drawn_from(tokens_of(tile(row), temperature=1), np.array([0, 0.5, 0, 0, 0.5, 0]))
    assert (tokens_of(tile(row), temperature=1, top_k=1) == 1).all()
    assert (tokens_of(tile(row), temperature=0) == 1).all()


def test_rows_with_nothing_to_draw_from_end_in_a_token_and_leave_others_alone() -> None:
    nothing, nan = [NO] * 12, [np.nan] * 12
    some = [np.nan, *ROWS["plain"][1:]]
    logits = np.array([nothing, nan, some, ROWS["plain"]] * 4, np.float32)
    for limits in ({"temperature": 0}, {"temperature": 1}, {"temperature": 1, "top_k": 4, "top_p": 0.9, "min_p": 0.1}):
        tokens = tokens_of(logits, **limits)
        assert ((tokens >= 0) & (tokens < 12)).all()
        np.testing.assert_array_equal(tokens[3::4], tokens_of(tile(ROWS["plain"], 16), **limits)[3::4])
        np.testing.assert_array_equal(tokens, tokens_of(logits, **limits))


# -- limits over whole vocabularies


def hard_rows(V: int) -> np.ndarray:
    rng = np.random.default_rng(V)
    normal = rng.normal(size=V) * 3
    return np.stack([
        normal, np.round(normal), rng.integers(0, 2, V), np.zeros(V), -np.abs(normal), rng.permutation(V) * 1e-4,
        np.where(rng.random(V) < 0.9, NO, normal), np.where(rng.random(V) < 0.5, 0.0, -0.0),
        np.exp(rng.normal(size=V) * 20), rng.normal(size=V) * 1e-30, 100 - np.geomspace(1e-5, 1e3, V), normal - 1e6,
    ]).astype(np.float32)


@pytest.mark.parametrize("V", [12, 1003, 131072 + 5])
def test_top_k_keeps_what_a_stable_sort_puts_first(V: int) -> None:
    logits = hard_rows(V)
    order = np.argsort(-logits, axis=-1, kind="stable")
    keep = jax.jit(lambda x, k: _top_k(_ordered(x), k))
    for k in sorted({1, 2, 7, V // 3, V - 1, V}):
        expected = np.zeros(logits.shape, bool)
        np.put_along_axis(expected, order[:, :k], True, axis=-1)
        np.testing.assert_array_equal(keep(logits, np.full(len(logits), k, np.int32)), expected)
    each = np.linspace(1, V, len(logits)).astype(np.int32)  # another k for each row
    np.testing.assert_array_equal(np.asarray(keep(logits, each)).sum(-1), each)


@pytest.mark.parametrize("V", [12, 1003, 131072 + 5])
def test_top_p_keeps_the_likeliest_that_reach_it(V: int) -> None:
    logits = hard_rows(V)
    below = logits - logits.max(axis=-1, keepdims=True)
    keep = jax.jit(lambda x, p: _top_p(jnp.exp(x), _ordered(x), p))
    for p in (1e-9, 0.1, 0.5, 0.9, 0.99, 0.9999):
        kept = np.asarray(keep(below, np.full(len(below), p, np.float32)))
        for row in range(len(below)):
            # In order of likelihood a beginning, whose probability is p but for rounding ...
            order, weights = kept_of(below[row], 1.0)
            n = int(kept[row].sum())
            assert n >= 1 and kept[row][order[:n]].all()
            share = np.cumsum(weights) / weights.sum()
            rounding = 1e-6 + V / 2**31
            assert share[n - 1] >= p - rounding and (n == 1 or share[n - 2] < p + rounding), (row, p)
            # ... which, where none comes so close, is just one.
            if abs(share[:n + 1] - p).min() > rounding:
                assert n == len(kept_of(below[row], 1.0, top_p=p)[0]), (row, p)


def test_top_p_1_keeps_all_beside_rows_that_it_limits() -> None:
    below = np.tile(np.array([0, -60, -104, NO], np.float32), (2, 1))  # the second has no place among whole numbers
    kept = _top_p(jnp.exp(below), _ordered(jnp.asarray(below)), jnp.array([1, 0.9999999]))
    np.testing.assert_array_equal(kept, [[True] * 4, [True, False, False, False]])


# -- randomness


def test_seeds_and_draws_decide() -> None:
    plain = distribution(ROWS["plain"], 1.0)
    logits, by_chance = tile(ROWS["plain"]), (plain ** 2).sum()
    seeds = np.random.default_rng(0).integers(0, 2**32, (N, 2), dtype=np.uint32)
    first = tokens_of(logits, seeds, temperature=1)
    np.testing.assert_array_equal(first, tokens_of(logits, seeds, temperature=1))
    assert_drawn_from(first, plain)
    others = dict(low_word=(seeds + np.array([0, 1], np.uint32), 0), high_word=(seeds + np.array([1, 0], np.uint32), 0),
                  swapped=(seeds[:, ::-1], 0), draw=(seeds, 1), late_draw=(seeds, 100_000))
    for name, (seed, number) in others.items():
        same = (first == tokens_of(logits, seed, temperature=1, draw=number)).mean()
        assert abs(same - by_chance) < 5 * np.sqrt(by_chance * (1 - by_chance) / N), name


def test_the_draws_of_one_seed_are_independent() -> None:
    tokens = tokens_of(tile([0.0] * 12), np.tile([0, 7], (N, 1)), temperature=1, draw=np.arange(N))
    assert_drawn_from(tokens, np.full(12, 1 / 12))
    assert_drawn_from(tokens[:-1] * 12 + tokens[1:], np.full(144, 1 / 144))


def test_every_token_of_a_large_vocabulary_has_its_chance() -> None:
    V, n = 5001, 4000
    tokens = tokens_of(np.zeros((n, V)), temperature=1)
    assert_drawn_from(tokens // 100, np.bincount(np.arange(V) // 100) / V)
    assert_drawn_from(tokens % 7, np.bincount(np.arange(V) % 7) / V)
    assert len(np.unique(tokens)) == pytest.approx(V * -np.expm1(-n / V), rel=0.02)


def test_rare_tokens_are_drawn_as_rarely_as_they_should() -> None:
    """A million rivals of equal weight: races are won with the finest of the random numbers."""
    noise = np.asarray(jax.jit(partial(_exponentials, n=2**20))(np.arange(16, dtype=np.uint32).reshape(8, 2),
                                                                np.arange(8)))
    smallest = noise.min(axis=-1) * 2**20
    assert (noise > 0).all() and np.isfinite(noise).all()
    assert len(np.unique(smallest)) == 8 and 0.3 < smallest.mean() < 2.5  # standard exponential itself
    shares = np.array([1e-4, 1e-3, 0.1, 0.5, 0.9, 0.999])
    deviation = np.sqrt(shares * (1 - shares) / noise.size)
    assert (abs((noise[..., None] < -np.log1p(-shares)).mean((0, 1)) - shares) < 5 * deviation).all()


def test_a_row_is_drawn_alike_in_whatever_batch() -> None:
    V = 4003
    rng = np.random.default_rng(5)
    logits = rng.normal(size=(24, V)).astype(np.float32) * 2
    asked = dict(temperature=rng.choice([0, 0.7, 1.5], 24), top_k=rng.choice([0, 50, 3000], 24),
                 top_p=rng.choice([1, 0.8], 24), min_p=rng.choice([0, 0.01], 24), draw=rng.integers(0, 99, 24))
    seeds = rng.integers(0, 2**32, (24, 2))
    tokens = tokens_of(logits, seeds, **asked)

    def those_of(places: np.ndarray) -> np.ndarray:
        return tokens_of(logits[places], seeds[places], **{name: values[places] for name, values in asked.items()})

    for R in (1, 3, 16):
        places = rng.permutation(24)[:R]
        np.testing.assert_array_equal(those_of(places), tokens[places])
    np.testing.assert_array_equal(those_of(np.arange(24)[::-1]), tokens[::-1])
    # Off the CPU all rows go together.
    whole = jax.jit(_sample)(logits, jax.tree.map(jnp.asarray, rows_of(24, seeds, **asked)), empty_state(1, V),
                             np.zeros((24, 126), np.uint32))
    np.testing.assert_array_equal(whole.tokens, tokens)


@pytest.mark.parametrize("seed, words", [
    (0, (0, 0)), (1, (0, 1)), (2**32, (1, 0)), (2**63 - 1, (2**31 - 1, 2**32 - 1)), (-1, (2**32 - 1, 2**32 - 1)),
    (-(2**63), (2**31, 0)), (0x123456789ABCDEF0, (0x12345678, 0x9ABCDEF0)),
])
def test_seed_words(seed: int, words: tuple[int, int]) -> None:
    assert seed_words(seed) == words


# -- devices


def test_on_a_mesh_each_device_draws_the_same(devices: list[jax.Device]) -> None:
    R, V = 8, 1003
    rng = np.random.default_rng(2)
    mesh = jax.make_mesh((4,), ("model",), axis_types=(AxisType.Explicit,), devices=devices[:4])
    replicated = NamedSharding(mesh, P())
    logits = rng.normal(size=(R, V)).astype(np.float32)
    history = np.arange(V) % 5 == 0
    state = empty_state(4, V)
    state = SlotState(state.history + 1 + history, state.edit_ids.at[1, 0].set(5), state.edit_values + 3,
                      state.edit_until + 9)
    rows = rows_of(R, slots=[0, 1, 2, 3, 9, 9, 9, 9], temperature=[0, 1] * 4, top_k=[0, 0, 0, 9] * 2,
                   top_p=[1, 0.9] * 4, min_p=0.01, repetition=[1, 2] * 4, frequency=0.1, edited=[False, True] * 4,
                   masked=[True, False, False, False] * 2, logprobs=True, live=[True] * 6 + [False] * 2)
    mask = rng.integers(0, 2**32, (R, 32), dtype=np.uint32)

    @partial(jax.jit, out_shardings=replicated)
    def on_mesh(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return sample(*arguments)

    expected = draw(logits, rows, state, mask)
    given = jax.device_put((logits, rows, state, mask), replicated)
    assert jax.typeof(given[0]).sharding.mesh == mesh.abstract_mesh
    jax.tree.map(np.testing.assert_array_equal, on_mesh(*given), expected)
