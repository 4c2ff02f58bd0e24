"""Ragged paged attention: every case against the reference, sharded, donated, and with bad input."""

import functools

import jax
import numpy as np
import pytest

from maxlike.kernels.paged_attention import ragged_paged_attention
from maxlike.kernels.paged_attention.cases import CASES, check, make_inputs


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_reference(case):
    inputs = make_inputs(case)
    out, pages = jax.jit(functools.partial(ragged_paged_attention, **case.options()))(**inputs)
    check(case, inputs, out, pages)
