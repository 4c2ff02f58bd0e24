"""Sampling against the distribution written out in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from maxlike.engine.sampling import SlotState, empty_state
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
    (0.7, 2, 0.99, 0), (1.0, 0, 1.0, 0.1), (1.0, 0, 1.0, 0.4), (2.0, 0, 1.0, 1.0), (0.5, 0, 1.0, 1e-3), (1.5, 7, 0.8, 0.2),
])
@pytest.mark.parametrize("row", ROWS)
def test_draws_follow_the_distribution(row: str, temperature: float, top_k: int, top_p: float, min_p: float,
                                       nobody: SlotState) -> None:
    tokens = tokens_of(ROWS[row], nobody, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert_follow(tokens, distribution(np.array(ROWS[row]), temperature, top_k, top_p, min_p))
