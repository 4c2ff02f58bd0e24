"""Scales of a quantised KV cache in checkpoints: read under each name, written back, refused where they are off."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

import maxlike
from maxlike.models import save_model
from maxlike.models.kv_scales import scale_of
from maxlike.models.registry import parse_config
from maxlike.nn.kv_cache import KVScales
from tests.models.checkpoints import Tensors, config_of, tensors_of, write

FP8 = "float8_e4m3fn"
N_LAYERS = 3
STATED = {(i, x): 0.01 * (1 + i) * (2 if x == "v" else 1) for i in range(N_LAYERS) for x in "kv"}
"""A scale for each layer, as numbers that float32 rounds."""
FORMS: dict[str, Any] = {
    "model.layers.{i}.self_attn.{x}_scale": np.float32,
    "model.layers.{i}.self_attn.attn.{x}_scale": lambda s: np.array([s], ml_dtypes.bfloat16),
    "model.layers.{i}.self_attn.{x}_proj.{x}_scale": lambda s: np.array([s, 2 * s], np.float32),
    "layers.{i}.self_attn.{x}_scale": lambda s: np.array([[[s]], [[3 * s]]], np.float32),
}
"""Names, and shapes and dtypes, that checkpoints have: one scale, or one for each of two KV heads."""


def scale_tensors(form: str) -> Tensors:
    return {form.format(i=i, x=x): np.asarray(FORMS[form](s)) for (i, x), s in STATED.items()}


def write_with(folder: Path, scales: Tensors, **changes: Any) -> Path:
    config = config_of("llama", **changes)
    write(folder, config, tensors_of(config) | scales)
    return folder


def problems(folder: Path, devices: list[jax.Device], **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        maxlike.load(folder, devices=devices[:1], **options)
    return str(raised.value)


@pytest.mark.parametrize("form", FORMS)
def test_every_name_is_read(form: str, tmp_path: Path, devices: list[jax.Device]) -> None:
    tensors = scale_tensors(form)
    folder = write_with(tmp_path, tensors)
    expected = {(i, x): tensors[form.format(i=i, x=x)].astype(np.float64).reshape(-1) for i, x in STATED}
    for dtype, factor in ((FP8, 1), ("int8", 448 / 127)):
        params = maxlike.load(folder, devices=devices[:2], kv_cache_dtype=dtype).kv_params
        assert params.dtype.name == dtype and params.scales is not None
        for (i, x), scale in expected.items():
            np.testing.assert_allclose(getattr(params.scales, x)[i], factor * np.broadcast_to(scale, 2), rtol=1e-12)


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_a_float_cache_ignores_scales(dtype: str | None, tmp_path: Path, devices: list[jax.Device]) -> None:
    tensors = scale_tensors("model.layers.{i}.self_attn.{x}_scale")
    tensors["model.layers.0.self_attn.k_scale"] = np.zeros(7, np.float32)  # of no use, and none of its business
    params = maxlike.load(write_with(tmp_path, tensors), devices=devices[:1], kv_cache_dtype=dtype).kv_params
    assert params.scales is None and params.dtype.name == (dtype or "float32")


def test_names_that_are_no_scales() -> None:
    assert scale_of("model.layers.12.self_attn.attn.v_scale") == (12, "v")
    for name in ("model.layers.0.self_attn.k_proj.v_scale", "model.layers.0.mlp.k_scale",
                 "model.layers.0.self_attn.q_proj.q_scale", "model.layers.0.self_attn.k_scale.weight"):
        assert scale_of(name) is None


def test_a_name_that_is_no_scale_is_unexpected(tmp_path: Path, devices: list[jax.Device]) -> None:
    folder = write_with(tmp_path, {"model.layers.0.self_attn.k_proj.v_scale": np.ones(1, np.float32)})
    assert "'model.layers.0.self_attn.k_proj.v_scale' is unexpected" in problems(folder, devices, kv_cache_dtype=FP8)


@pytest.mark.parametrize("dtype", [FP8, "int8"])
def test_scales_are_saved_and_come_back(dtype: str, tmp_path: Path, devices: list[jax.Device]) -> None:
    folder = write_with(tmp_path / "one", {})
    rng = np.random.default_rng(0)
    scales = KVScales(*rng.uniform(0.001, 0.1, (2, N_LAYERS, 2)))
    model = maxlike.load(folder, devices=devices[:2], kv_cache_dtype=dtype, kv_scales=scales)
    assert model.kv_params.scales == scales
    save_model(model, parse_config(folder)[0], tmp_path / "two")
    again = maxlike.load(tmp_path / "two", devices=devices[:1], kv_cache_dtype=dtype).kv_params.scales
    assert again is not None
    np.testing.assert_allclose([again.k, again.v], [scales.k, scales.v], rtol=2**-24)
    stored = load_file(tmp_path / "two" / "model.safetensors")
    stated = stored["model.layers.1.self_attn.v_scale"]  # for float8, whatever the cache was
    np.testing.assert_allclose(stated, np.array(scales.v[1]) * (127 / 448 if dtype == "int8" else 1), rtol=1e-6)
    assert stated.dtype == np.float32 and stated.shape == (2,)
    assert sum(name.endswith("_scale") for name in stored) == 2 * N_LAYERS
    save_model(maxlike.load(tmp_path / "two", devices=devices[:1]), parse_config(folder)[0], tmp_path / "three")
    assert not [name for name in load_file(tmp_path / "three" / "model.safetensors") if name.endswith("_scale")]


def test_calibrated_scales_generate(tmp_path: Path, devices: list[jax.Device]) -> None:
    folder = write_with(tmp_path, {}, num_hidden_layers=1)
    prompt = np.random.default_rng(0).integers(0, 1003, 40).astype(np.int32)
    scales = maxlike.calibrate(maxlike.load(folder, devices=devices[:1]), prompt, np.array([0, 25, 40]))

    def continued(**cache: Any) -> list[int]:
        llm = maxlike.LLM(folder, devices=devices[:1], max_num_seqs=1, max_model_len=64, **cache)
        greedy = maxlike.SamplingParams(temperature=0, max_tokens=8)
        return llm.generate(prompt, greedy, use_tqdm=False)[0].outputs[0].token_ids

    expected, got = continued(), continued(kv_cache_dtype="int8", kv_scales=scales)
    assert got[0] == expected[0] and len(got) == 8


def test_int8_without_scales_names_calibrate(tmp_path: Path, devices: list[jax.Device]) -> None:
    folder = write_with(tmp_path, {})
    told = problems(folder, devices, kv_cache_dtype="int8")
    assert "maxlike.calibrate(" in told and str(folder) in told
    assert maxlike.load(folder, devices=devices[:1], kv_cache_dtype=FP8).kv_params.scales is None


def test_options_that_do_not_fit(tmp_path: Path, devices: list[jax.Device]) -> None:
    folder = write_with(tmp_path, {})
    ones = KVScales(3 * ((1.0, 1.0),), 3 * ((1.0, 1.0),))
    assert "give kv_cache_dtype as well" in problems(folder, devices, kv_scales=ones)
    assert "belong to a cache of int8" in problems(folder, devices, kv_scales=ones, kv_cache_dtype="bfloat16")
    assert "got 'int7'" in problems(folder, devices, kv_cache_dtype="int7")
    few = KVScales(((1.0, 1.0),), ((1.0, 1.0),))
    assert "1 layers" in problems(folder, devices, kv_scales=few, kv_cache_dtype="int8")


def test_scales_that_are_off_are_all_named(tmp_path: Path, devices: list[jax.Device]) -> None:
    tensors = scale_tensors("model.layers.{i}.self_attn.{x}_scale")
    del tensors["model.layers.2.self_attn.v_scale"]
    tensors |= {
        "model.layers.0.self_attn.k_scale": np.float32([1, 2, 3]),
        "model.layers.0.self_attn.v_scale": np.array([1], np.int32),
        "model.layers.1.self_attn.k_scale": np.float32([-1.0]),
        "model.layers.1.self_attn.attn.v_scale": np.array(1.0, np.float32),
        "model.layers.3.self_attn.k_scale": np.array(1.0, np.float32),
    }
    told = problems(write_with(tmp_path, tensors), devices, kv_cache_dtype=FP8)
    for words in (r"layers.0.self_attn.k_scale' is float32\[3\]; a scale is .* each of 2 KV heads",
                  r"layers.0.self_attn.v_scale' is int32\[1\]", "layers.1.self_attn.k_scale' has a scale that is not",
                  "both the scale of layer 1's v", "of layer 3; the model has layers 0 to 2",
                  r"'model.layers.2.self_attn.v_scale' is missing"):  # fmt: skip
        assert re.search(words, told), (words, told)
    assert len(told.splitlines()) == 7


def test_scales_in_a_file_that_is_missing_are_not_called_absent(tmp_path: Path) -> None:
    form = "model.layers.{i}.self_attn.{x}_scale"
    config = config_of("llama", num_hidden_layers=N_LAYERS)
    tensors = write(tmp_path, config)
    (tmp_path / "model.safetensors").rename(tmp_path / "weights.safetensors")  # or the index would not be read
    places = dict.fromkeys(tensors, "weights.safetensors") | dict.fromkeys(scale_tensors(form), "scales.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    for dtype in ("int8", FP8):
        with pytest.raises(ValueError, match=r"scales\.safetensors"):
            maxlike.load(tmp_path, kv_cache_dtype=dtype)
