"""Transformers over int8 and float8 caches: calibrated, and close to the same models over a float cache."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import maxlike
from maxlike.nn.kv_cache import SMALLEST_SCALE, KVCacheStrategy, KVScales, calibrate
from maxlike.nn.transformer.segments import named_parameters
from tests.nn.transformer.tiny import STEPS, TOTALS, Tiny, abstract, build, plain_logits, ragged, sequences, serve

INTERLEAVED = Tiny(windows=(3, 3, None, 3, 3, None))
SCANNED = dict(use_subgraphs=True, groups=[[0, 1, 3, 4], [2, 5]])
BATCH = ragged(sequences(INTERLEAVED), (0,) * len(TOTALS), (5, 0, 1, 7))


def by_hand(tiny: Tiny, largest: float, lengths: tuple[int, ...] = (5, 0, 1, 7)) -> tuple[np.ndarray, np.ndarray]:
    """k and v scales [L, K] for the sequences' first tokens, `BATCH` if not told, from keys and values written out."""
    cached: list[tuple[Any, Any]] = []
    plain_logits(tiny, tiny.weights(), sequences(tiny), cached=cached)
    own = np.arange(max(TOTALS)) < np.array(lengths)[:, None]  # [S, L]
    k, v = (np.array([np.abs(layer[own]).max((0, 2)) for layer in layers]) for layers in zip(*cached, strict=True))
    return k / largest, v / largest


@pytest.mark.parametrize(
    ("dtype", "largest", "n_devices", "options"),
    [("int8", 127, 1, {}), ("float8_e4m3fn", 448, 8, SCANNED), ("int8", 127, 2, SCANNED),
     ("int8", 127, 1, dict(strategy=KVCacheStrategy.CONTINUOUS))],
    ids=["unrolled", "scanned_on_8", "scanned_on_2", "continuous"],
)  # fmt: skip
def test_scales_are_those_computed_by_hand(devices: list[jax.Device], dtype: str, largest: float, n_devices: int,
                                           options: dict[str, Any]) -> None:
    model = build(INTERLEAVED, devices[:n_devices], **options)
    scales = calibrate(model, *BATCH, dtype)
    for got, expected in zip((scales.k, scales.v), by_hand(INTERLEAVED, largest), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert maxlike.calibrate is calibrate
    assert model.kv_params.scales is None and model.kv_params.dtype == np.float32  # it is the model's copy that ran


def test_a_head_of_zeros_has_a_scale(devices: list[jax.Device]) -> None:
    model = build(Tiny(), devices[:1])
    for names, _, param in named_parameters(model):
        if names == ["layers.1.attention.v_proj.weight"]:
            param.set_value(param.get_value() * (np.arange(16) >= 8)[:, None])
    scales = calibrate(model, *BATCH)
    assert scales.v[1][0] == SMALLEST_SCALE < min(scales.v[0] + scales.v[1][1:] + scales.k[1])


def test_what_cannot_be_calibrated(devices: list[jax.Device]) -> None:
    model = build(Tiny(), devices[:1])
    with pytest.raises(ValueError, match="Only caches of int8 or float8_e4m3fn have scales; got bfloat16"):
        calibrate(model, *BATCH, dtype="bfloat16")
    with pytest.raises(ValueError, match="calibrate needs tokens"):
        calibrate(model, np.zeros(4, np.int32), np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="Token id 61 is beyond the vocabulary"):
        calibrate(model, np.array([61]), np.array([0, 1]))
    for _, _, param in named_parameters(model):
        param.set_value(param.get_value() * np.nan)
    with pytest.raises(ValueError, match="not finite"):
        calibrate(model, *BATCH)


# Each dtype's error as a part of the largest logit, twice what was seen: int8 has 7 bits beside the sign, float8 3.
BOUNDS = {"int8": 0.07, "float8_e4m3fn": 0.17}


@pytest.fixture(scope="module")
def expected(devices: list[jax.Device]) -> list[np.ndarray]:
    """Each step's logits over a float cache."""
    return serve(build(INTERLEAVED, devices[:1]), sequences(INTERLEAVED))[0]


@pytest.mark.parametrize(("n_devices", "options"), [(1, {}), (8, SCANNED)], ids=["unrolled", "scanned_on_8"])
@pytest.mark.parametrize("dtype", BOUNDS)
def test_logits_are_near_those_of_a_float_cache(devices: list[jax.Device], expected: list[np.ndarray], n_devices: int,
                                                options: dict[str, Any], dtype: str) -> None:
    tokens = sequences(INTERLEAVED)
    scales = KVScales(*by_hand(INTERLEAVED, dict(int8=127, float8_e4m3fn=448)[dtype], TOTALS))
    model = build(INTERLEAVED, devices[:n_devices], dtype=dtype, scales=scales, **options)
    got, pages = serve(model, tokens)
    assert pages.dtype == model.kv_params.dtype
    same = total = 0
    for g, e, new in zip(got, expected, STEPS, strict=True):
        there = np.array(new) > 0
        assert np.isnan(g[~there]).all()
        error = np.abs(g[there] - e[there]).max() / np.abs(e[there]).max()
        assert 0 < error < BOUNDS[dtype]
        same, total = same + (g[there].argmax(-1) == e[there].argmax(-1)).sum(), total + there.sum()
    assert same >= 0.75 * total


def test_float8_without_scales(devices: list[jax.Device], expected: list[np.ndarray]) -> None:
    got, _ = serve(build(INTERLEAVED, devices[:2], dtype="float8_e4m3fn"), sequences(INTERLEAVED))
    for g, e in zip(got, expected, strict=True):
        # Small values are coarser than with scales.
        assert np.nanmax(np.abs(g - e)) < 2 * BOUNDS["float8_e4m3fn"] * np.nanmax(np.abs(e))


def test_equal_scales_make_equal_models(devices: list[jax.Device]) -> None:
    """Models are told apart by their scales, and not by the objects: that decides what is compiled again."""

    def graphdef(value: float) -> nnx.GraphDef:
        scales = KVScales(*(tuple(map(tuple, np.full((2, 2), value).tolist())) for _ in range(2)))
        return nnx.split(abstract(Tiny(), devices[:1], dtype="int8", scales=scales))[0]

    assert len({graphdef(1.0), graphdef(1.0)}) == 1
    assert len({graphdef(1.0), graphdef(2.0)}) == 2
