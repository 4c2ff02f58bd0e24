"""Random configs as transformers itself writes and reads them: every field, the frequencies, the parameters' names."""

import importlib
import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from maxlike.models.build import build_model
from maxlike.models.config import TransformerConfig
from maxlike.models.family import canonical_names, hf_name
from maxlike.models.registry import family_of, parse_config, unparse_config
from maxlike.nn.transformer.segments import named_parameters

transformers = pytest.importorskip("transformers")
torch = pytest.importorskip("torch")

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "gemma3_text": "Gemma3"}
MODEL_TYPES = [*CLASSES]
ROPE_TYPES = ["default", "linear", "llama3", "yarn"]
SEEDS = range(4)


def config_class(model_type: str) -> type:
    return getattr(transformers, CLASSES[model_type] + ("TextConfig" if model_type == "gemma3_text" else "Config"))


def modeling(model_type: str) -> Any:
    module = model_type.removesuffix("_text")
    return importlib.import_module(f"transformers.models.{module}.modeling_{module}")


def parse(config_json: dict) -> TransformerConfig:
    return family_of(config_json).parse(config_json)


def random_rope(rng: random.Random, rope_type: str, max_positions: int) -> dict:
    rope: dict = {"rope_type": rope_type, "rope_theta": rng.choice([1e4, 5e5, 1e6, 1234.5])}
    if rope_type == "default":
        return rope
    rope["factor"] = rng.choice([1.5, 4.0, 32.0])
    if rope_type == "llama3":
        rope |= {"low_freq_factor": rng.choice([1.0, 2.0]), "high_freq_factor": 4.0,
                 "original_max_position_embeddings": max_positions // rng.choice([2, 4])}
    if rope_type == "yarn":
        optional = {"original_max_position_embeddings": max_positions // 4, "beta_fast": 24.0, "beta_slow": 2.0,
                    "attention_factor": 1.25, "mscale": 0.707, "truncate": False}
        rope |= {name: value for name, value in optional.items() if rng.random() < 0.5}
        if "mscale" in rope and rng.random() < 0.7:
            rope["mscale_all_dim"] = 1.0
    # Under "default", transformers 5 reads no partial_rotary_factor; see test_partial_rotary_default.
    if rng.random() < 0.3:
        rope["partial_rotary_factor"] = rng.choice([0.5, 0.25])
    return rope


def random_fields(model_type: str, rope_type: str, seed: int) -> dict:
    """Keyword arguments for the config class; small, for models to be made of them."""
    rng = random.Random(f"{model_type} {rope_type} {seed}")
    kv_heads, n = rng.choice([1, 2, 3]), rng.choice([2, 7, 13])
    heads = kv_heads * rng.choice([1, 2, 4])
    fields: dict = dict(
        vocab_size=rng.choice([97, 1003]), hidden_size=heads * rng.choice([8, 24]),
        intermediate_size=rng.choice([40, 96]), num_hidden_layers=n, num_attention_heads=heads,
        num_key_value_heads=kv_heads, head_dim=rng.choice([16, 32, 80]),
        max_position_embeddings=rng.choice([2048, 40960]), rms_norm_eps=rng.choice([1e-5, 1e-6]),
        tie_word_embeddings=rng.random() < 0.5, dtype=rng.choice(["float32", "bfloat16", "float16"]),
        bos_token_id=rng.choice([None, 3]), eos_token_id=rng.choice([None, 5, [5, 7]]))
    rope = partial(random_rope, rng, max_positions=fields["max_position_embeddings"])
    fields["rope_parameters"] = rope(rope_type)
    if model_type != "gemma3_text":
        fields["hidden_act"] = rng.choice(["silu", "gelu", "gelu_pytorch_tanh"])
    if model_type == "llama":
        fields |= dict(attention_bias=rng.random() < 0.5, mlp_bias=rng.random() < 0.5)
    if model_type == "mistral":
        fields |= dict(sliding_window=rng.choice([None, 9]))
    if model_type in ("qwen2", "qwen3"):
        fields |= dict(use_sliding_window=rng.random() < 0.7, sliding_window=11, max_window_layers=rng.randint(0, n))
    windows = model_type == "gemma3_text" or fields.get("use_sliding_window", False)
    if windows and rng.random() < 0.3:
        fields["layer_types"] = rng.choices(["full_attention", "sliding_attention"], k=n)
    if model_type in ("qwen3", "gemma3_text"):
        fields["attention_bias"] = rng.random() < 0.5
    if model_type == "gemma3_text":
        fields |= dict(sliding_window=13, query_pre_attn_scalar=rng.choice([16, 168]),
                       attn_logit_softcapping=rng.choice([None, 50.0]),
                       final_logit_softcapping=rng.choice([None, 30.0]))
        if rng.random() < 0.5:
            fields["sliding_window_pattern"] = rng.choice([1, 2, 3])
        fields["rope_parameters"] = {"full_attention": fields["rope_parameters"],
                                     "sliding_attention": rope(rng.choice(["default", "linear"]))}
        fields["rope_parameters"]["full_attention"].pop("truncate", None)  # transformers looks for it one level up
    return fields


def as_transformers_4(fields: dict) -> dict:
    """The same config in the older words."""
    older = {name: value for name, value in fields.items() if name not in ("rope_parameters", "dtype")}
    rope = fields["rope_parameters"]
    if "full_attention" in rope:
        older["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    rope = dict(rope)
    older |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": fields["dtype"]}
    if "full_attention" not in fields["rope_parameters"] and "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    if rope["rope_type"] != "default":
        if "full_attention" not in fields["rope_parameters"]:  # there transformers 5 misses the oldest word
            rope["type"] = rope.pop("rope_type")
        older["rope_scaling"] = rope
    return older


@pytest.fixture(params=[(m, r, s) for m in MODEL_TYPES for r in ROPE_TYPES for s in SEEDS],
                ids=lambda p: "-".join(map(str, p)))
def case(request: pytest.FixtureRequest) -> tuple[str, dict, Any]:
    """(model_type, fields, transformers' config of them)"""
    model_type, rope_type, seed = request.param
    fields = random_fields(model_type, rope_type, seed)
    return model_type, fields, config_class(model_type)(**json.loads(json.dumps(fields)))


def test_fields_and_frequencies(case: tuple[str, dict, Any]) -> None:
    model_type, _, theirs = case
    ours = parse(json.loads(theirs.to_json_string(use_diff=False)))
    assert ours.model_type == model_type
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "bos_token_id"):
        assert getattr(ours, name) == getattr(theirs, name, None), name
    assert ours.dtype == str(theirs.dtype).removeprefix("torch.")
    assert ours.hidden_act == getattr(theirs, "hidden_activation", None) or theirs.hidden_act
    for name in ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"):
        assert getattr(ours, name) == getattr(theirs, name, None), name
    assert ours.attention_output_bias == getattr(theirs, "attention_bias", False)
    assert ours.attention_bias == (model_type == "qwen2" or ours.attention_output_bias)
    assert ours.mlp_bias == getattr(theirs, "mlp_bias", False)
    eos = theirs.eos_token_id
    assert list(ours.eos_token_ids) == (eos if isinstance(eos, list) else [] if eos is None else [eos])

    attention = getattr(modeling(model_type), CLASSES[model_type] + "Attention")
    assert len(ours.layers) == theirs.num_hidden_layers
    with torch.device("meta"):
        windows = [getattr(attention(theirs, i), "sliding_window", theirs.to_dict().get("sliding_window"))
                   for i in range(theirs.num_hidden_layers)]
    if model_type == "llama":
        assert windows == [None] * len(windows)
    assert [layer.sliding_window for layer in ours.layers] == windows

    rotary = getattr(modeling(model_type), CLASSES[model_type] + "RotaryEmbedding")(config=theirs)
    for i, layer in enumerate(ours.layers):
        prefix = f"{theirs.layer_types[i]}_" if model_type == "gemma3_text" else ""
        inv_freq = getattr(rotary, prefix + "inv_freq").numpy()
        # A few roundings of float32 apart: pow is not the same function in torch and numpy.
        np.testing.assert_allclose(layer.rope.inv_freq, inv_freq, rtol=1e-6)
        scaling = layer.rope.scaling
        factor = 1.0 if scaling is None else scaling.attention_factor
        assert factor == pytest.approx(getattr(rotary, prefix + "attention_scaling"), rel=1e-12)


def test_older_words_mean_the_same(case: tuple[str, dict, Any]) -> None:
    model_type, fields, theirs = case
    if model_type == "gemma3_text":  # the older words know nothing of sliding layers but their theta
        near = {"rope_type": "default", "rope_theta": 4321.0}
        fields = fields | {"rope_parameters": fields["rope_parameters"] | {"sliding_attention": near}}
        theirs = config_class(model_type)(**json.loads(json.dumps(fields)))
    older = as_transformers_4(fields)
    ours = parse({"model_type": model_type, **older})
    assert ours == parse(json.loads(theirs.to_json_string(use_diff=False)))
    read = config_class(model_type)(**json.loads(json.dumps(older)))
    assert ours == parse(json.loads(read.to_json_string(use_diff=False)))


def test_transformers_reads_what_is_written(case: tuple[str, dict, Any], tmp_path: Path) -> None:
    model_type, _, theirs = case
    ours = parse(json.loads(theirs.to_json_string()))  # only what differs from the defaults
    (tmp_path / "config.json").write_text(json.dumps(unparse_config(ours)))
    assert parse_config(tmp_path)[0] == ours
    read = transformers.AutoConfig.from_pretrained(tmp_path)
    assert type(read) is type(theirs)
    assert read.architectures == [CLASSES[model_type] + "ForCausalLM"]
    assert parse(json.loads(read.to_json_string(use_diff=False))) == ours
    read.save_pretrained(tmp_path)
    assert parse_config(tmp_path)[0] == ours


def test_partial_rotary_default() -> None:
    """transformers 5 passes over the share where nothing is scaled; with factor 1 it tells what the share means."""
    rope = {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    theirs = transformers.LlamaConfig(head_dim=80, rope_parameters=rope)
    inv_freq = modeling("llama").LlamaRotaryEmbedding(theirs).inv_freq.numpy()
    ours = parse({"model_type": "llama", "head_dim": 80, "rope_theta": 1e4, "partial_rotary_factor": 0.5})
    np.testing.assert_allclose(ours.layers[0].rope.inv_freq, inv_freq, rtol=1e-6)


def parameter_shapes(config: TransformerConfig) -> dict[str, tuple[int, ...]]:
    """Canonical Hugging Face name to shape, of every parameter of the model built from `config`."""
    family = family_of({"model_type": config.model_type})
    model = nnx.eval_shape(partial(build_model, config, dtype="float32", use_subgraphs=False))
    return {hf_name(family, name): tuple(param.get_metadata("logical_shape"))
            for names, _, param in named_parameters(model) for name in names}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_parameters_are_those_of_transformers(model_type: str, seed: int) -> None:
    fields = random_fields(model_type, "default", seed) | {"num_hidden_layers": 2}
    fields.pop("layer_types", None)
    theirs = config_class(model_type)(**fields)
    config = parse(json.loads(theirs.to_json_string(use_diff=False)))
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs)
    stored = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    names = canonical_names(family_of({"model_type": model_type}), stored, tied=config.tie_word_embeddings)
    assert {canonical: stored[name] for name, canonical in names.items()} == parameter_shapes(config)


@pytest.mark.parametrize("base", [False, True])
def test_parameters_of_a_gemma_that_sees(base: bool) -> None:
    text = random_fields("gemma3_text", "linear", 0) | {"num_hidden_layers": 2}
    text.pop("layer_types", None)
    sight = dict(hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=28,
                 patch_size=14)
    theirs = transformers.Gemma3Config(text_config=text, vision_config=sight, tie_word_embeddings=True)
    config = parse(json.loads(theirs.to_json_string(use_diff=False)))
    assert config == parse(json.loads(theirs.to_json_string()))
    with torch.device("meta"):
        model = transformers.Gemma3ForConditionalGeneration(theirs)
    stored = {name: tuple(tensor.shape) for name, tensor in (model.model if base else model).state_dict().items()}
    names = canonical_names(family_of({"model_type": "gemma3"}), stored, tied=True)
    assert {canonical: stored[name] for name, canonical in names.items()} == parameter_shapes(config)
