"""Sampling against the distribution written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maxlike.engine.sampling import SlotState, empty_state, seed_words
from tests.engine.drawing import all_allowed, distribution, rows_of, run

N = 20_000  # draws of each distribution
NO = -np.inf
ROWS = {
    "plain": [1.0, -0.5, 2.0, 0.3, -3.0, 1.9, 0.0, -1.0, 2.5, 0.7, -0.2, 1.2],
    "ties": [1.0, 2.0, 2.0, 0.0, 1.0, 2.0, 1.0, 0.0, 2.0, 1.0, 0.0, 0.0],
    "masked": [NO, 1.0, NO, NO, 0.5, NO, NO, 0.0, NO, NO, -1.0, NO],
}


@pytest.fixture(scope="module")
def nobody() -> SlotState:
    """The state of a slot that nothing is known of."""
    return empty_state(1, 12)


def tokens_of(logits: Any, state: SlotState, **asked: Any) -> np.ndarray:
    logits = np.asarray(logits, np.float32)
    if logits.ndim == 1:
        logits = np.tile(logits, (N, 1))
    asked = {"draw": np.arange(len(logits)), **asked}
    tokens = run(logits, rows_of(len(logits), **asked), state, all_allowed(*logits.shape))[0].tokens
    assert tokens.dtype == np.int32
    return np.asarray(tokens)


def assert_follow(tokens: np.ndarray, expected: np.ndarray) -> None:
    counts = np.bincount(tokens, minlength=len(expected))
    assert not counts[expected == 0].any(), "drawn beyond the limits"
    deviation = np.sqrt(expected * (1 - expected) / len(tokens))
    assert (np.abs(counts / len(tokens) - expected) <= 5 * deviation + 1e-12).all(), (counts / len(tokens), expected)


@pytest.mark.parametrize("temperature, top_k, top_p, min_p", [
    (1.0, 0, 1.0, 0), (0.4, 0, 1.0, 0), (3.0, 0, 1.0, 0), (1.0, 1, 1.0, 0), (1.0, 3, 1.0, 0), (1.0, 12, 1.0, 0),
    (1.0, 1000, 1.0, 0), (1.0, 0, 0.9, 0), (1.0, 0, 0.45, 0), (1.0, 0, 0.01, 0), (3.0, 0, 0.6, 0), (1.0, 5, 0.7, 0),
    (0.7, 2, 0.99, 0), (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 0.4), (2.0, 0, 1.0, 1.0), (0.5, 0, 1.0, 1e-3),
    (1.5, 7, 0.8, 0.2),
])
@pytest.mark.parametrize("row", ROWS)
def test_draws_follow_the_distribution(row: str, temperature: float, top_k: int, top_p: float, min_p: float,
                                       nobody: SlotState) -> None:
    tokens = tokens_of(ROWS[row], nobody, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_follow(tokens, distribution(np.array(ROWS[row]), temperature, top_k, top_p, min_p))


@pytest.mark.parametrize("top_p, kept", [(0.49, 1), (0.5, 1), (0.51, 2), (0.74, 2), (0.76, 3), (0.9, 4), (1.0, 4)])
def test_top_p_ends_with_the_token_that_reaches_it(top_p: float, kept: int, nobody: SlotState) -> None:
    halves = np.pad(np.log([0.5, 0.25, 0.125, 0.125]), (0, 8), constant_values=-np.inf)
    assert len(np.unique(tokens_of(halves, nobody, top_p=top_p))) == kept


@pytest.mark.parametrize("asked, kept", [
    (dict(top_k=5), 5), (dict(top_p=0.4), 5),  # four have 1/3 and are short of it
    (dict(top_p=0.25), 3), (dict(top_k=6, top_p=0.5), 3), (dict(min_p=1.0), 12), (dict(), 12)])
def test_among_equals_limits_take_the_first_and_as_many_as_they_say(asked: dict[str, Any], kept: int,
                                                                    nobody: SlotState) -> None:
    for equal in (0.5, 0.0, -7.0):
        np.testing.assert_array_equal(np.unique(tokens_of([equal] * 12, nobody, **asked)), np.arange(kept))


@pytest.mark.parametrize("asked", [dict(top_k=3), dict(top_p=0.35), dict(top_k=3, temperature=1e30, top_p=0.9)])
def test_two_zeros_are_equal(asked: dict[str, Any], nobody: SlotState) -> None:
    zeros = np.where(np.arange(12) % 2, 0.0, -0.0)
    zeros[[0, 5, 6]] = -1.0, -1e30, -1.0
    kept = np.unique(tokens_of(zeros, nobody, **asked))
    np.testing.assert_array_equal(kept, [1, 2, 3] if "top_k" in asked else [1, 2, 3, 4])


def test_where_probabilities_are_equal_and_logits_are_not_top_p_goes_by_logits(nobody: SlotState) -> None:
    rising = np.arange(12.0)
    kept = np.unique(tokens_of(rising, nobody, temperature=1e30, top_p=0.5))
    np.testing.assert_array_equal(kept, np.arange(6, 12))


@pytest.mark.parametrize("limits", [dict(), dict(top_k=5), dict(top_p=0.3), dict(min_p=0.5), dict(seed=7)])
def test_temperature_0_is_greedy_whatever_else_is_asked(limits: dict[str, Any], nobody: SlotState) -> None:
    logits = np.random.default_rng(0).normal(size=(N, 12)).astype(np.float32)
    np.testing.assert_array_equal(tokens_of(logits, nobody, temperature=0, **limits), logits.argmax(-1))
    assert (tokens_of(ROWS["ties"], nobody, temperature=0, **limits) == 1).all()  # the first of the likeliest
    mixed = tokens_of(logits, nobody, temperature=np.arange(N) % 2, **limits)
    np.testing.assert_array_equal(mixed[::2], logits[::2].argmax(-1))


@pytest.mark.parametrize("temperature", [1e-3, 1e-30, 1e-38, 1e-44])
@pytest.mark.parametrize("limits", [dict(), dict(top_k=4, top_p=0.9, min_p=0.1)])
@pytest.mark.parametrize("sign", [1, -1])
def test_temperatures_near_0_are_greedy(temperature: float, limits: dict[str, Any], sign: int,
                                        nobody: SlotState) -> None:
    """Even where logits divided by them are infinite."""
    step = 10 if temperature == 1e-3 else 1e-6
    logits = step * np.random.default_rng(1).permuted(np.tile(np.arange(12.0) + 1, (N, 1)), axis=1)
    np.testing.assert_array_equal(tokens_of(sign * logits, nobody, temperature=temperature, **limits),
                                  (sign * logits).argmax(-1))


def test_temperatures_near_0_draw_among_the_likeliest(nobody: SlotState) -> None:
    expected = np.where(np.array(ROWS["ties"]) == 2, 0.25, 0)
    assert_follow(tokens_of(ROWS["ties"], nobody, temperature=1e-37), expected)
    # Where the device takes a smaller one for 0, the first of them.
    assert_follow(tokens_of(ROWS["ties"], nobody, temperature=0), np.arange(12) == 1)


@pytest.mark.parametrize("temperature", [1e10, 1e30, 3.4e38])
def test_high_temperatures_are_uniform(temperature: float, nobody: SlotState) -> None:
    assert_follow(tokens_of(ROWS["plain"], nobody, temperature=temperature), np.full(12, 1 / 12))
    assert_follow(tokens_of(ROWS["masked"], nobody, temperature=temperature), np.isfinite(ROWS["masked"]) / 4)
    # The limits go on meaning what they say.
    likeliest = np.isin(np.arange(12), np.argsort(ROWS["plain"])[-3:])
    assert_follow(tokens_of(ROWS["plain"], nobody, temperature=temperature, top_k=3), likeliest / 3)
    assert_follow(tokens_of(ROWS["plain"], nobody, temperature=temperature, top_p=0.24), likeliest / 3)


@pytest.mark.parametrize("asked", [dict(), dict(top_k=2), dict(top_p=0.5), dict(min_p=0.5), dict(temperature=0)])
def test_rows_that_no_model_should_give(asked: dict[str, Any], nobody: SlotState) -> None:
    """They are drawn somehow, the same each time, and leave the rows beside them alone."""
    good = np.random.default_rng(2).normal(size=(N, 12)).astype(np.float32)
    bad = good.copy()
    bad[::8] = np.nan
    bad[1::8, 3] = np.nan
    bad[2::8] = -np.inf
    bad[3::8, 5] = np.inf
    bad[4::8, 2:4] = np.inf
    bad[5::8] = np.inf
    tokens = tokens_of(bad, nobody, **asked)
    assert ((tokens >= 0) & (tokens < 12)).all()
    np.testing.assert_array_equal(tokens, tokens_of(bad, nobody, **asked))
    for good_place in (6, 7):
        np.testing.assert_array_equal(tokens[good_place::8], tokens_of(good, nobody, **asked)[good_place::8])
    assert len(np.unique(tokens[2::8])) == 1
    assert (tokens[3::8] == 5).all()
    if asked in (dict(), dict(min_p=0.5), dict(top_k=2)):
        assert_follow(tokens[4::8], np.where(np.isin(np.arange(12), [2, 3]), 0.5, 0))
    elif asked == dict(temperature=0):
        assert (tokens[4::8] == 2).all() and (tokens[5::8] == 0).all()


def test_rows_are_drawn_each_from_its_own_and_by_itself(nobody: SlotState) -> None:
    logits = np.zeros((N, 12))
    logits[np.arange(N), np.arange(N) % 12] = 50.0
    np.testing.assert_array_equal(tokens_of(logits, nobody), np.arange(N) % 12)


@pytest.mark.parametrize("random", ["draw", "low word of the seed", "high word of the seed", "both"])
def test_seed_and_number_of_the_draw_decide(random: str, nobody: SlotState) -> None:
    """Which of them goes on makes no difference: the tokens follow the distribution and not each other."""
    def asked(offset: int) -> dict[str, Any]:
        number = np.arange(N) + offset
        if random == "draw":
            return dict(draw=number, seed=-5)
        if random == "both":
            return dict(draw=number, seed=number)
        return dict(draw=7, seed=number << 32 if random.startswith("high") else number)

    expected = distribution(np.array(ROWS["plain"]), 1.0)
    tokens = tokens_of(ROWS["plain"], nobody, **asked(0))
    np.testing.assert_array_equal(tokens, tokens_of(ROWS["plain"], nobody, **asked(0)))
    assert_follow(tokens, expected)
    alike = (expected**2).sum()
    for other in (tokens[1:], tokens[2:], tokens_of(ROWS["plain"], nobody, **asked(N))):
        same = (tokens[:len(other)] == other).mean()
        assert abs(same - alike) < 5 * np.sqrt(alike * (1 - alike) / len(other))


def test_many_tokens_of_one_probability(nobody: SlotState) -> None:
    """Of tokens far from each other in the vocabulary, and of neighbours, none is preferred."""
    tokens = tokens_of([0.0] * 12, nobody, seed=99)
    assert_follow(tokens, np.full(12, 1 / 12))
    pairs = tokens[::2] * 12 + tokens[1::2]
    assert_follow(pairs, np.full(144, 1 / 144))


@pytest.mark.parametrize("seed, words", [
    (0, (0, 0)), (1, (0, 1)), (2**32 - 1, (0, 2**32 - 1)), (2**32, (1, 0)), (2**63 - 1, (2**31 - 1, 2**32 - 1)),
    (-1, (2**32 - 1, 2**32 - 1)), (-(2**63), (2**31, 0)),
])
def test_seeds_of_64_bits(seed: int, words: tuple[int, int]) -> None:
    assert seed_words(seed) == words
