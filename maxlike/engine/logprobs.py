"""Log-probabilities, from the arrays of a step to what a request reports."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from maxlike.engine.output import Logprob
from maxlike.engine.sampling import Sampled


def logprob_entries(sampled: Sampled, rows: Collection[int], tokens: Sequence[int],
                    n_top: int | None) -> list[dict[int, Logprob]]:
    """For each row the logprobs of its token, then of the likeliest `n_top`, by token id."""
    logprob, rank, top_ids, top_logprobs = (np.asarray(array) for array in sampled[1:])
    entries = []
    for row, token in zip(rows, tokens, strict=False):
        entry = {token: Logprob(float(logprob[row]), int(rank[row]))}
        for place in range(min(n_top or 0, top_ids.shape[1])):
            entry.setdefault(int(top_ids[row, place]), Logprob(float(top_logprobs[row, place]), place + 1))
        entries.append(entry)
    return entries
