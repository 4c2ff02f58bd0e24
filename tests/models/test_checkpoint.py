"""Loading and saving: every parameter arrives, on every mesh, and what is wrong with a checkpoint is said at once."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import maxlike
from maxlike.models import TransformerConfig, build_model, parse_config, save_model
from maxlike.models.safetensors import CheckpointError
from maxlike.nn.transformer.distributed_transformer import DistributedTransformer
from maxlike.nn.transformer.segments import DirectSegment, ScannedSegment, named_parameters
from tests.models.checkpoints import FAMILIES, Tensors, config_of, tensors_of, write


def config_at(folder: Path) -> TransformerConfig:
    return parse_config(folder)[0]


def parameters(model: DistributedTransformer) -> Tensors:
    """Every parameter by its name here, one a layer, the padding cut off."""
    found: Tensors = {}
    for names, stacked, param in named_parameters(model):
        shape = param.get_metadata("logical_shape")
        value = np.asarray(param.get_value())
        for name, array in zip(names, value if stacked else [value], strict=True):
            assert name not in found
            found[name] = array[tuple(map(slice, shape))]
    return found


def saved(model: DistributedTransformer, config: TransformerConfig, folder: Path, **options: Any) -> Tensors:
    """What `save_model` writes, read by the safetensors library."""
    save_model(model, config, folder, **options)
    return {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def assert_same(found: Tensors, expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for name, array in expected.items():
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensors]:
    """A folder with a Llama, for tests that only read it, and its tensors."""
    folder = tmp_path_factory.mktemp("llama")
    return folder, write(folder, config_of("llama"))


# -- what is there arrives


@pytest.mark.parametrize("n_devices, use_subgraphs", [(1, False), (8, True)])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_tensor_arrives_and_is_saved_under_its_name(model_type: str, n_devices: int, use_subgraphs: bool,
                                                          tmp_path: Path, devices: list[jax.Device]) -> None:
    expected = write(tmp_path / "given", config_of(model_type))
    model = maxlike.load(tmp_path / "given", devices=devices[:n_devices], use_subgraphs=use_subgraphs)
    assert_same(saved(model, config_at(tmp_path / "given"), tmp_path / "saved"), expected)


def test_parameters_are_found_where_their_names_say(llama: tuple[Path, Tensors], devices: list[jax.Device]) -> None:
    """Saving undoes loading, wrong names and all; this does not."""
    folder, tensors = llama
    found = parameters(maxlike.load(folder, devices=devices[:1]))
    assert len(found) == len(tensors)
    for ours, theirs in {
        "embedding.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight",
        "output.weight": "lm_head.weight",
        "layers.1.attention.k_proj.weight": "model.layers.1.self_attn.k_proj.weight",
        "layers.1.attention.v_proj.bias": "model.layers.1.self_attn.v_proj.bias",
        "layers.2.attention.o_proj.bias": "model.layers.2.self_attn.o_proj.bias",
        "layers.2.mlp.gate_proj.weight": "model.layers.2.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.bias": "model.layers.0.mlp.up_proj.bias",
        "layers.0.mlp_norm.weight": "model.layers.0.post_attention_layernorm.weight",
        "layers.2.attention_norm.weight": "model.layers.2.input_layernorm.weight",
    }.items():
        np.testing.assert_array_equal(found[ours], tensors[theirs], err_msg=ours)


@pytest.mark.parametrize("use_subgraphs", [False, True])
@pytest.mark.parametrize("n_devices", [1, 2, 4, 8])
def test_meshes_hold_the_same_numbers_each_device_its_share(n_devices: int, use_subgraphs: bool,
                                                            llama: tuple[Path, Tensors],
                                                            devices: list[jax.Device]) -> None:
    model = maxlike.load(llama[0], devices=devices[:n_devices], use_subgraphs=use_subgraphs)
    assert dict(model.mesh.shape) == (
        {"kv": 2, "rep": n_devices // 2} if n_devices > 2 else {"model": n_devices})
    assert_same(parameters(model), parameters(maxlike.load(llama[0], devices=devices[:1], use_subgraphs=False)))

    cut = {"embedding": (1003, 64), "output": (1003, 64), "q_proj": (128, 64), "k_proj": (32, 64), "v_proj": (32, 64),
           "o_proj": (64, 128), "gate_proj": (72, 64), "up_proj": (72, 64), "down_proj": (64, 72)}
    for names, stacked, param in named_parameters(model):
        module, leaf = names[0].split(".")[-2:]
        if leaf != "weight" or module not in cut:
            continue
        shards = min(n_devices, 2) if module in ("k_proj", "v_proj") else n_devices  # there are two KV heads
        share = list(cut[module])
        dimension = int(module in ("o_proj", "down_proj"))
        share[dimension] = math.ceil(share[dimension] / shards)
        value = param.get_value()
        assert {shard.device for shard in value.addressable_shards} == {*devices[:n_devices]}
        for shard in value.addressable_shards:
            assert list(shard.data.shape[stacked:]) == share, (names, shard.device)
        if module in ("embedding", "output"):
            assert not np.asarray(value)[1003:].any()  # padding


def test_tied_embeddings_are_one_array(tmp_path: Path, devices: list[jax.Device]) -> None:
    expected = write(tmp_path, config_of("llama", tie_word_embeddings=True))
    model = maxlike.load(tmp_path, devices=devices)
    assert "output.weight" not in parameters(model)
    assert model.output.weight.get_value() is model.embedding.weight.get_value()
    np.testing.assert_array_equal(np.asarray(model.output.weight.get_value())[:1003],
                                  expected["model.embed_tokens.weight"])


@pytest.mark.parametrize("n_layers, segments", [(3, [(1, 2), (1, 1)]), (7, [(3, 2), (1, 1)]), (8, [(3, 2), (1, 2)])])
def test_gemma_alternates_in_one_scan_and_a_tail(n_layers: int, segments: list[tuple[int, int]],
                                                 devices: list[jax.Device], tmp_path: Path) -> None:
    """`segments` are (layers traced, times repeated), of layers SSF SSF SS cut off at `n_layers`."""
    types = config_of("gemma3_text")["layer_types"] + ["sliding_attention"]
    config = config_of("gemma3_text", num_hidden_layers=n_layers, layer_types=types[:n_layers])
    write(tmp_path, config)
    scanned = maxlike.load(tmp_path, devices=devices[:1], use_subgraphs=True)
    direct = maxlike.load(tmp_path, devices=devices[:1], use_subgraphs=False)
    assert [type(s) for s in direct.segments] == [DirectSegment]
    assert all(isinstance(s, ScannedSegment) for s in scanned.segments)
    assert [(s.period, s.repeats) for s in scanned.segments] == segments
    assert_same(parameters(scanned), parameters(direct))


# -- files


def test_sharded_files(llama: tuple[Path, Tensors], tmp_path: Path, devices: list[jax.Device]) -> None:
    folder, expected = llama
    model = maxlike.load(folder, devices=devices[:4])
    found = saved(model, config_at(folder), tmp_path, max_shard_bytes=100_000)
    files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and "model.safetensors" not in files
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert {*index["weight_map"]} == {*expected} and {*index["weight_map"].values()} == {*files}
    assert index["metadata"]["total_size"] == sum(array.nbytes for array in expected.values())
    assert_same(found, expected)
    assert_same(parameters(maxlike.load(tmp_path, devices=devices[:1])), parameters(model))


def test_saving_over_the_folder_that_was_loaded(tmp_path: Path, devices: list[jax.Device]) -> None:
    expected = write(tmp_path, config_of("qwen2"))
    model = maxlike.load(tmp_path, devices=devices[:2])
    for max_shard_bytes in (100_000, 10**9):
        assert_same(saved(model, config_at(tmp_path), tmp_path, max_shard_bytes=max_shard_bytes), expected)
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_config_survives_saving(tmp_path: Path, devices: list[jax.Device]) -> None:
    write(tmp_path, config_of("gemma3_text", final_logit_softcapping=30.0, eos_token_id=[2, 7]))
    config = config_at(tmp_path)
    save_model(maxlike.load(tmp_path, devices=devices[:1]), config, tmp_path / "saved")
    assert config_at(tmp_path / "saved") == config
    generation = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [2, 7]


def test_a_model_built_at_random_can_be_saved_and_loaded(tmp_path: Path, devices: list[jax.Device]) -> None:
    write(tmp_path / "given", config_of("mistral", num_hidden_layers=1, tie_word_embeddings=True))
    config = config_at(tmp_path / "given")
    model = build_model(config, devices=devices[:2], use_subgraphs=True)
    save_model(model, config, tmp_path / "saved")
    assert_same(parameters(maxlike.load(tmp_path / "saved", devices=devices[:1])), parameters(model))


@pytest.mark.parametrize("change", [dict(vocab_size=1000), dict(mlp_bias=False), dict(tie_word_embeddings=True),
                                    dict(num_key_value_heads=4)])
def test_a_config_that_is_not_the_models_is_not_saved(change: dict[str, Any], llama: tuple[Path, Tensors],
                                                      tmp_path: Path, devices: list[jax.Device]) -> None:
    model = maxlike.load(llama[0], devices=devices[:1])
    with pytest.raises(ValueError, match="The model is not the config's"):
        save_model(model, replace(config_at(llama[0]), **change), tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# -- dtypes


def test_float32_as_bfloat16_and_back(llama: tuple[Path, Tensors], tmp_path: Path, devices: list[jax.Device]) -> None:
    folder, tensors = llama
    rounded = {name: array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()}
    model = maxlike.load(folder, devices=devices[:2], dtype="bfloat16")
    assert_same(saved(model, config_at(folder), tmp_path), rounded)
    assert config_at(tmp_path).dtype == "bfloat16"
    assert {array.dtype for array in parameters(maxlike.load(tmp_path, devices=devices[:1])).values()} == {
        np.dtype(ml_dtypes.bfloat16)}
    widened = maxlike.load(tmp_path, devices=devices[:1], dtype=jnp.float32)
    assert_same(saved(widened, config_at(tmp_path), tmp_path / "wide"),
                {name: array.astype(np.float32) for name, array in rounded.items()})


def test_float16_is_widened_or_becomes_bfloat16(tmp_path: Path, devices: list[jax.Device]) -> None:
    halves = {name: array.astype(np.float16) for name, array in tensors_of(config_of("mistral")).items()}
    write(tmp_path, config_of("mistral", torch_dtype="float16"), halves)
    config = config_at(tmp_path)
    assert config.dtype == "float16"
    assert_same(saved(maxlike.load(tmp_path, devices=devices[:2]), config, tmp_path / "bf16"),
                {name: array.astype(ml_dtypes.bfloat16) for name, array in halves.items()})
    assert_same(saved(maxlike.load(tmp_path, devices=devices[:2], dtype="float32"), config, tmp_path / "f32"),
                {name: array.astype(np.float32) for name, array in halves.items()})


@pytest.mark.parametrize("dtype", ["int8", "float64", "float16"])
def test_dtypes_that_models_do_not_compute_in(dtype: str, llama: tuple[Path, Tensors],
                                              devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=f"float32 or bfloat16; got .*{dtype}"):
        maxlike.load(llama[0], devices=devices[:1], dtype=dtype)


# -- names in checkpoints


def test_checkpoints_of_the_model_without_its_head(tmp_path: Path, devices: list[jax.Device]) -> None:
    config = config_of("qwen3")
    tensors = write(tmp_path / "given", config)
    bare = {name.removeprefix("model."): array for name, array in tensors.items()}
    write(tmp_path / "bare", config, bare)
    assert_same(parameters(maxlike.load(tmp_path / "bare", devices=devices[:1])),
                parameters(maxlike.load(tmp_path / "given", devices=devices[:1])))


@pytest.mark.parametrize("prefix, head", [("language_model.model.", "language_model.lm_head."),
                                          ("model.language_model.", "lm_head.")])
def test_the_text_part_of_a_gemma_that_sees(prefix: str, head: str, tmp_path: Path, devices: list[jax.Device]) -> None:
    """Under the names of transformers 4 and of 5; what sees is passed over."""
    text = config_of("gemma3_text", tie_word_embeddings=False)
    tensors = write(tmp_path / "text", text)
    seeing = {name.replace("model.", prefix) if name.startswith("model.") else name.replace("lm_head.", head): array
              for name, array in tensors.items()}
    tower, projector = ("model." if prefix.startswith("model.") else "") + "vision_tower.", "multi_modal_projector."
    seeing[tower + "vision_model.embeddings.patch_embedding.weight"] = np.zeros((4, 3, 2, 2), np.float32)
    seeing[tower.replace("vision_tower.", projector) + "mm_input_projection_weight"] = np.zeros((4, 64), np.float32)
    whole = dict(model_type="gemma3", text_config=text, vision_config={}, torch_dtype="float32",
                 tie_word_embeddings=False)
    write(tmp_path / "seeing", whole, seeing)
    model = maxlike.load(tmp_path / "seeing", devices=devices[:1])
    assert_same(saved(model, config_at(tmp_path / "seeing"), tmp_path / "saved"), tensors)


def test_tied_embeddings_in_each_of_their_spellings(tmp_path: Path, devices: list[jax.Device]) -> None:
    """Checkpoints hold a tied head once, twice, or only as the head; rope buffers follow from the config."""
    config = config_of("llama", tie_word_embeddings=True)
    once = write(tmp_path / "once", config)
    embedding = once["model.embed_tokens.weight"]
    write(tmp_path / "twice", config, once | {
        "lm_head.weight": embedding.copy(), "model.rotary_emb.inv_freq": np.ones(8, np.float32),
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)})
    only = {name: array for name, array in once.items() if name != "model.embed_tokens.weight"}
    write(tmp_path / "only", config, only | {"lm_head.weight": embedding})
    expected = parameters(maxlike.load(tmp_path / "once", devices=devices[:1]))
    for spelling in ("twice", "only"):
        assert_same(parameters(maxlike.load(tmp_path / spelling, devices=devices[:1])), expected)


# -- what is wrong


def problems(folder: Path, devices: list[jax.Device], **options: Any) -> str:
    with pytest.raises(ValueError) as raised:
        maxlike.load(folder, devices=devices[:1], **options)
    return str(raised.value)


def test_all_problems_are_told_at_once(tmp_path: Path, devices: list[jax.Device]) -> None:
    config = config_of("llama")
    tensors = tensors_of(config)
    del tensors["model.layers.1.mlp.up_proj.bias"], tensors["lm_head.weight"]
    tensors["model.layers.2.self_attn.k_proj.weight"] = np.zeros((48, 64), np.float32)
    tensors["model.norm.weight"] = np.zeros(64, np.int8)
    tensors["embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.3.mlp.up_proj.weight"] = np.zeros((72, 64), np.float32)
    tensors["model.layers.0.self_attn.q_norm.weight"] = np.zeros(16, np.float32)
    write(tmp_path, config, tensors)
    with pytest.raises(CheckpointError) as raised:
        maxlike.load(tmp_path, devices=devices[:1])
    header, *lines = str(raised.value).splitlines()
    assert header.startswith("7 problems") and str(tmp_path) in header
    assert lines == raised.value.problems
    assert sorted(lines) == sorted([
        "tensors 'embed_tokens.weight' and 'model.embed_tokens.weight' both mean 'model.embed_tokens.weight'; expected "
        "one of them",
        "tensor 'model.layers.1.mlp.up_proj.bias' is missing",
        "tensor 'lm_head.weight' is missing",
        "tensor 'model.layers.2.self_attn.k_proj.weight' has shape [48, 64]; the config means [32, 64]",
        "tensor 'model.norm.weight' is int8; expected floating point (quantised checkpoints are not supported)",
        "tensor 'model.layers.3.mlp.up_proj.weight' is unexpected: this model has no such parameter",
        "tensor 'model.layers.0.self_attn.q_norm.weight' is unexpected: this model has no such parameter",
    ])


@pytest.mark.parametrize("use_subgraphs", [False, True])
def test_one_problem_is_one_problem(use_subgraphs: bool, tmp_path: Path, devices: list[jax.Device]) -> None:
    tensors = tensors_of(config_of("mistral"))
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write(tmp_path, config_of("mistral"), tensors)
    told = problems(tmp_path, devices, use_subgraphs=use_subgraphs).splitlines()
    assert told == [f"1 problem with the checkpoint in {tmp_path}:",
                    "tensor 'model.layers.1.mlp.up_proj.weight' is missing"]


def test_a_file_cut_short_is_told_beside_the_rest(tmp_path: Path, devices: list[jax.Device]) -> None:
    config = config_of("mistral")
    tensors = tensors_of(config)
    halves = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    for name, array in tensors.items():
        halves["model-0000{}-of-00002.safetensors".format(1 + ("layers.2" in name))][name] = array
    del halves["model-00001-of-00002.safetensors"]["model.layers.0.input_layernorm.weight"]
    for file, part in halves.items():
        save_file(part, tmp_path / file)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {}, "weight_map": {name: file for file, part in halves.items() for name in part}}))
    cut = tmp_path / "model-00002-of-00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-10])
    told = problems(tmp_path, devices)
    assert told.startswith("2 problems")
    assert f"{cut}: cut short" in told and "tensor 'model.layers.0.input_layernorm.weight' is missing" in told
    cut.unlink()
    told = problems(tmp_path, devices)
    assert told.startswith("2 problems") and f"{cut}: the file is missing" in told


def test_one_parameter_under_two_names(tmp_path: Path, devices: list[jax.Device]) -> None:
    tensors = tensors_of(config_of("llama"))
    write(tmp_path, config_of("llama"), tensors | {"norm.weight": tensors["model.norm.weight"]})
    told = problems(tmp_path, devices)
    assert "model.norm.weight" in told and "norm.weight" in told.replace("model.norm.weight", "")


def test_folders_that_are_no_checkpoint(tmp_path: Path, devices: list[jax.Device]) -> None:
    assert str(tmp_path / "nowhere") in problems(tmp_path / "nowhere", devices)
    assert "config.json" in problems(tmp_path, devices)
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in problems(tmp_path, devices)
    (tmp_path / "config.json").write_text(json.dumps(config_of("llama")))
    assert "no weights found" in problems(tmp_path, devices)
    for config in ({"model_type": "mamba"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        told = problems(tmp_path, devices)
        assert str(tmp_path / "config.json") in told and config.get("model_type", "no model_type") in told
        assert all(name in told for name in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3"))


@pytest.mark.parametrize("n_devices", [3, 5, 6, 7])
def test_numbers_of_devices_that_do_not_fit(n_devices: int, llama: tuple[Path, Tensors],
                                            devices: list[jax.Device]) -> None:
    with pytest.raises(ValueError, match=rf"size {n_devices} does not fit .*8 heads.*Legal sizes: 1, 2, 4, 8\."):
        maxlike.load(llama[0], devices=devices[:n_devices])


def test_token_ids_beyond_the_vocabulary(llama: tuple[Path, Tensors], devices: list[jax.Device]) -> None:
    """1003 to 1007 would be padding on eight devices."""
    model = maxlike.load(llama[0], devices=devices)
    for bad in (1003, -1):
        with pytest.raises(ValueError, match=rf"Token id {bad} is beyond the vocabulary: ids are 0 to 1002\."):
            model(np.array([5, bad], np.int32), None, None, np.array([0, 2], np.int32))
