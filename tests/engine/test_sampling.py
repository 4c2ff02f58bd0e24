"""Sampling against the distribution written out in numpy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from maxlike.engine.sampling import SamplingParams, sample

N = 20_000  # draws of each distribution
NO = -np.inf
ROWS = {
    "plain": [1.0, -0.5, 2.0, 0.3, -3.0, 1.9, 0.0, -1.0, 2.5, 0.7, -0.2, 1.2],
    "ties": [1.0, 2.0, 2.0, 0.0, 1.0, 2.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0],
    "masked": [NO, 1.0, NO, NO, 0.5, NO, NO, 0.0, NO, NO, -1.0, NO],
}
draw = jax.jit(sample)


def tokens_of(logits: Any, temperature: float, top_k: int = 0, top_p: float = 1.0, seed: int = 0) -> np.ndarray:
    drawn = draw(jnp.asarray(logits, jnp.float32), jnp.float32(temperature), jnp.int32(top_k), jnp.float32(top_p),
                 jax.random.key(seed))
    assert drawn.dtype == jnp.int32
    return np.asarray(drawn)


def tile(values: Any) -> np.ndarray:
    return np.tile(np.asarray(values, np.float32), (N, 1))


def distribution(logits: list[float], temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Each token's probability; of equal ones those with lower ids come first."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    if top_k:
        order = order[:top_k]
    weights = np.exp((logits[order] - logits.max()) / temperature)
    weights /= weights.sum()
    kept = 1
    while kept < len(order) and weights[:kept].sum() < top_p:
        kept += 1
    probabilities = np.zeros(len(logits))
    probabilities[order[:kept]] = weights[:kept] / weights[:kept].sum()
    return probabilities


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.4, 0, 1.0), (3.0, 0, 1.0), (1.0, 1, 1.0), (1.0, 3, 1.0), (1.0, 12, 1.0), (1.0, 1000, 1.0),
    (1.0, 0, 0.9), (1.0, 0, 0.45), (1.0, 0, 0.01), (3.0, 0, 0.6), (1.0, 5, 0.7), (0.7, 2, 0.99),
])
@pytest.mark.parametrize("row", ROWS)
def test_draws_follow_the_distribution(row: str, temperature: float, top_k: int, top_p: float) -> None:
    expected = distribution(ROWS[row], temperature, top_k, top_p)
    counts = np.bincount(tokens_of(tile(ROWS[row]), temperature, top_k, top_p), minlength=len(expected))
    assert not counts[expected == 0].any(), "drawn beyond the limits"
    deviation = np.sqrt(expected * (1 - expected) / N)
    assert (np.abs(counts / N - expected) <= 5 * deviation + 1e-12).all(), (counts / N, expected)


def test_top_p_ends_with_the_token_that_reaches_it() -> None:
    halves = np.log2([2.0, 1.0, 0.5, 0.5]) * np.log(2)  # probabilities 1/2, 1/4, 1/8, 1/8
    halves = np.pad(halves, (0, 8), constant_values=-np.inf)
    for top_p, kept in ((0.49, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)):
        assert len(np.unique(tokens_of(tile(halves), 1.0, 0, top_p))) == kept, top_p


def test_among_equals_limits_take_as_many_as_they_say() -> None:
    equal = tile([0.5] * 12)
    assert len(np.unique(tokens_of(equal, 1.0, top_k=5))) == 5
    assert len(np.unique(tokens_of(equal, 1.0, top_p=0.4))) == 5  # four have 1/3 and are short of it
    assert len(np.unique(tokens_of(equal, 1.0))) == 12


def test_temperature_0_is_greedy_whatever_else_is_asked() -> None:
    logits = np.random.default_rng(0).normal(size=(N, 12))
    for limits in ({}, {"top_k": 5}, {"top_p": 0.3}, {"seed": 7}):
        np.testing.assert_array_equal(tokens_of(logits, 0.0, **limits), logits.astype(np.float32).argmax(-1))
    assert (tokens_of(tile(ROWS["ties"]), 0.0) == 1).all()  # the first of the likeliest


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-44])
@pytest.mark.parametrize("sign", [1, -1])
def test_temperatures_near_0_are_greedy(temperature: float, sign: int) -> None:
    """Even where logits divided by them are infinite."""
    logits = 10 * np.random.default_rng(1).permuted(np.tile(np.arange(12.0) + 1, (N, 1)), axis=1)
    np.testing.assert_array_equal(tokens_of(sign * logits, temperature), (sign * logits).argmax(-1))


def test_high_temperatures_are_uniform() -> None:
    counts = np.bincount(tokens_of(tile(ROWS["plain"]), 1e30), minlength=12)
    assert (np.abs(counts / N - 1 / 12) < 5 * np.sqrt(1 / 12 * 11 / 12 / N)).all()


def test_rows_are_drawn_each_from_its_own_and_by_itself() -> None:
    logits = np.zeros((N, 12))
    logits[np.arange(N), np.arange(N) % 12] = 50.0
    np.testing.assert_array_equal(tokens_of(logits, 1.0), np.arange(N) % 12)
    first, second = tokens_of(tile([0.0] * 12), 1.0).reshape(2, -1)
    assert abs((first == second).mean() - 1 / 12) < 5 * np.sqrt(1 / 12 * 11 / 12 / (N / 2))


def test_the_key_decides() -> None:
    logits = tile(ROWS["plain"])
    np.testing.assert_array_equal(tokens_of(logits, 1.0, seed=3), tokens_of(logits, 1.0, seed=3))
    same = (tokens_of(logits, 1.0, seed=3) == tokens_of(logits, 1.0, seed=4)).mean()
    assert abs(same - (distribution(ROWS["plain"], 1.0, 0, 1.0) ** 2).sum()) < 5 * np.sqrt(0.25 / N)


@pytest.mark.parametrize("wrong, says", [
    (dict(temperature=-0.1), "temperature must be 0 .*got -0.1"),
    (dict(temperature=float("nan")), "temperature must be 0 .*got nan"),
    (dict(temperature=float("inf")), "temperature must be 0 .*got inf"),
    (dict(temperature=1e39), r"temperature must be 0 .*float32; got 1e\+39"),
    (dict(top_k=-1), "top_k must be 0 .*got -1"),
    (dict(top_k=2**31), "top_k must be 0 .*int32; got 2147483648"),
    (dict(top_p=0.0), "top_p must be above 0 .*got 0.0"),
    (dict(top_p=1.1), "top_p must be above 0 .*got 1.1"),
    (dict(top_p=float("nan")), "top_p must be above 0 .*got nan"),
    (dict(seed=-1), "seed must be between 0 and 4294967295; got -1"),
    (dict(seed=2**32), "seed must be between 0 and 4294967295; got 4294967296"),
])
def test_params_out_of_range(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SamplingParams(**wrong)


def test_params_at_the_ends_of_their_ranges() -> None:
    assert SamplingParams() == SamplingParams(temperature=0, top_k=0, top_p=1, seed=0)
    SamplingParams(temperature=1e-44, top_k=2**31 - 1, top_p=1e-9, seed=2**32 - 1)
    SamplingParams(temperature=3.4e38)
