"""Configs of real models in every dialect against hand-written facts, what is refused, and parameters' names."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from maxlike.models.config import LayerConfig, TransformerConfig
from maxlike.models.family import canonical_names, hf_name
from maxlike.models.registry import family_of, parse_config, unparse_config
from maxlike.nn.rotary_embedding import LinearScaling, Llama3Scaling, RotaryEmbedding, YarnScaling

CONFIGS = Path(__file__).parent / "configs"
MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gemma3"]


def read(file: str) -> dict:
    return json.loads((CONFIGS / f"{file}.json").read_text())


def parse(config_json: dict) -> TransformerConfig:
    return family_of(config_json).parse(config_json)


# Facts: written from the models' published descriptions, so that nothing here is read by the code under test.

def llama3(head_dim: int, factor: float) -> RotaryEmbedding:
    return RotaryEmbedding(head_dim, 500000.0, None, Llama3Scaling(factor, 1.0, 4.0, 8192))


def plain(n: int, rope: RotaryEmbedding, window: int | None = None) -> tuple[LayerConfig, ...]:
    return (LayerConfig(rope, window),) * n


def five_to_one(n: int, head_dim: int, window: int, factor: float | None) -> tuple[LayerConfig, ...]:
    near = LayerConfig(RotaryEmbedding(head_dim, 10000.0), window)
    far = LayerConfig(RotaryEmbedding(head_dim, 1e6, None, None if factor is None else LinearScaling(factor)))
    return tuple([near, near, near, near, near, far] * n)[:n]


LLAMA = dict(model_type="llama", vocab_size=128256, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
             max_position_embeddings=131072, dtype="bfloat16", bos_token_id=128000)
MISTRAL = dict(model_type="mistral", hidden_size=4096, intermediate_size=14336, num_attention_heads=32,
               num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5, max_position_embeddings=32768,
               dtype="bfloat16", bos_token_id=1, eos_token_ids=(2,))
QWEN2 = dict(model_type="qwen2", attention_bias=True, dtype="bfloat16", bos_token_id=151643)
QWEN2_7B = QWEN2 | dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
                        num_key_value_heads=4, head_dim=128)
QWEN3 = dict(model_type="qwen3", vocab_size=151936, num_key_value_heads=8, head_dim=128, qk_norm=True,
             max_position_embeddings=40960, dtype="bfloat16", bos_token_id=151643, eos_token_ids=(151645,))
GEMMA3 = dict(model_type="gemma3_text", hidden_act="gelu_pytorch_tanh", tie_word_embeddings=True, qk_norm=True,
              norm_weight_offset=1.0, sandwich_norm=True, dtype="bfloat16", bos_token_id=2, eos_token_ids=(1, 106))
FACTS = {
    "llama-3.1-8b": LLAMA | dict(
        hidden_size=4096, intermediate_size=14336, head_dim=128, layers=plain(32, llama3(128, 8.0)),
        eos_token_ids=(128001,)),
    "llama-3.2-1b-instruct": LLAMA | dict(
        hidden_size=2048, intermediate_size=8192, head_dim=64, layers=plain(16, llama3(64, 32.0)),
        tie_word_embeddings=True, eos_token_ids=(128001, 128008, 128009)),
    "mistral-7b-v0.1": MISTRAL | dict(vocab_size=32000, layers=plain(32, RotaryEmbedding(128, 10000.0), 4096)),
    "mistral-7b-v0.3": MISTRAL | dict(vocab_size=32768, layers=plain(32, RotaryEmbedding(128, 1e6))),
    "qwen2-7b": QWEN2_7B | dict(
        max_position_embeddings=131072, eos_token_ids=(151643,), layers=plain(28, RotaryEmbedding(128, 1e6))),
    "qwen2.5-7b-instruct-yarn": QWEN2_7B | dict(
        max_position_embeddings=32768, eos_token_ids=(151645,),
        layers=plain(28, RotaryEmbedding(128, 1e6, None, YarnScaling(4.0, 32768)))),
    "qwen2.5-0.5b": QWEN2 | dict(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2,
        head_dim=64, max_position_embeddings=32768, tie_word_embeddings=True, eos_token_ids=(151643,),
        layers=plain(24, RotaryEmbedding(64, 1e6))),
    "qwen3-0.6b": QWEN3 | dict(
        hidden_size=1024, intermediate_size=3072, num_attention_heads=16, tie_word_embeddings=True,
        layers=plain(28, RotaryEmbedding(128, 1e6))),
    "qwen3-8b": QWEN3 | dict(
        hidden_size=4096, intermediate_size=12288, num_attention_heads=32, layers=plain(36, RotaryEmbedding(128, 1e6))),
    "qwen3-32b": QWEN3 | dict(
        hidden_size=5120, intermediate_size=25600, num_attention_heads=64, layers=plain(64, RotaryEmbedding(128, 1e6))),
    "gemma-3-1b-it": GEMMA3 | dict(
        vocab_size=262144, hidden_size=1152, intermediate_size=6912, num_attention_heads=4, num_key_value_heads=1,
        head_dim=256, max_position_embeddings=32768, query_pre_attn_scalar=256, embedding_scale=math.sqrt(1152),
        layers=five_to_one(26, 256, 512, None)),
    "gemma-3-4b-it": GEMMA3 | dict(
        vocab_size=262208, hidden_size=2560, intermediate_size=10240, num_attention_heads=8, num_key_value_heads=4,
        head_dim=256, max_position_embeddings=131072, query_pre_attn_scalar=256, embedding_scale=math.sqrt(2560),
        layers=five_to_one(34, 256, 1024, 8.0)),
    "gemma-3-27b-it": GEMMA3 | dict(
        vocab_size=262208, hidden_size=5376, intermediate_size=21504, num_attention_heads=32, num_key_value_heads=16,
        head_dim=128, max_position_embeddings=131072, query_pre_attn_scalar=168, embedding_scale=math.sqrt(5376),
        layers=five_to_one(62, 128, 1024, 8.0)),
}
FILES = sorted(file.stem for file in CONFIGS.glob("*.json"))


def model_of(file: str) -> str:
    return file.partition(".saved-by-")[0]


def test_every_model_has_a_file_from_the_hub_and_one_of_transformers_5() -> None:
    assert {*FACTS} == {model_of(file) for file in FILES}
    assert {f"{model}.saved-by-5" for model in FACTS} | {*FACTS} <= {*FILES}
    assert any(file.endswith(".saved-by-4") for file in FILES)


FP8_CACHE = {"type": "float", "num_bits": 8, "strategy": "tensor", "dynamic": False, "symmetric": True}


@pytest.mark.parametrize("file", FILES)
def test_real_configs(file: str) -> None:
    assert parse(read(file)) == TransformerConfig(**FACTS[model_of(file)])


def test_saved_files_are_in_their_dialect() -> None:
    for file in FILES:
        config_json = read(file)
        text = config_json.get("text_config", config_json)
        assert ("rope_parameters" in text) == file.endswith(".saved-by-5"), file


def without_5(config_json: dict) -> dict:
    """What transformers 4 knows of."""
    return {name: value for name, value in config_json.items() if name not in ("rope_parameters", "dtype")}


def without_4(config_json: dict) -> dict:
    """What transformers 5 writes."""
    older = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq", "sliding_window_pattern",
             "torch_dtype")
    return {name: value for name, value in config_json.items() if name not in older}


@pytest.mark.parametrize("model", FACTS)
def test_what_is_written_reads_back_in_either_dialect(model: str) -> None:
    config = TransformerConfig(**FACTS[model])
    config_json = json.loads(json.dumps(unparse_config(config)))
    for dialect in (config_json, without_5(config_json), without_4(config_json)):
        assert parse(dialect) == config
    before_layer_types = {name: value for name, value in without_5(config_json).items() if name != "layer_types"}
    assert parse(before_layer_types) == config


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_defaults(model_type: str) -> None:
    config = parse({"model_type": model_type})
    assert parse(unparse_config(config)) == config
    assert config.dtype == "float32"


def test_missing_and_null_differ() -> None:
    assert parse({"model_type": "mistral"}).layers[0].sliding_window == 4096
    assert parse({"model_type": "mistral", "sliding_window": None}).layers[0].sliding_window is None
    assert parse({"model_type": "qwen3"}).head_dim == 128
    assert parse({"model_type": "llama", "head_dim": None, "num_key_value_heads": None}).num_key_value_heads == 32
    assert parse({"model_type": "llama", "eos_token_id": None, "bos_token_id": None}).eos_token_ids == ()


def test_windows_of_qwen() -> None:
    fields = {"model_type": "qwen2", "num_hidden_layers": 4, "max_window_layers": 1, "sliding_window": 7}
    assert [layer.sliding_window for layer in parse(fields).layers] == [None] * 4
    used = fields | {"use_sliding_window": True}
    assert [layer.sliding_window for layer in parse(used).layers] == [None, 7, 7, 7]
    assert {layer.sliding_window for layer in parse(used | {"sliding_window": None}).layers} == {None}
    stated = used | {"layer_types": ["sliding_attention", "full_attention"] * 2}
    assert [layer.sliding_window for layer in parse(stated).layers] == [7, None, 7, None]
    assert parse(unparse_config(parse(stated))) == parse(stated)


def test_mistral_with_layer_types_alternates() -> None:
    # transformers takes such a file for a Ministral, whose layers do.
    fields = {"model_type": "mistral", "num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}
    assert [layer.sliding_window for layer in parse(fields).layers] == [None, 4096]
    assert "layer_types" in unparse_config(parse(fields))


def test_partial_rotary() -> None:
    for fields in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}):
        rope = parse({"model_type": "llama", "head_dim": 80, **fields}).layers[0].rope
        assert rope == RotaryEmbedding(80, 10000.0, 40)
    for head_dim in range(2, 300, 2):  # a share that is not exact must not lose a dimension on its way to a file
        for rotary_dim in range(2, head_dim, 2):
            config = parse({"model_type": "llama", "head_dim": head_dim})
            config = replace(config, layers=plain(1, RotaryEmbedding(head_dim, 10000.0, rotary_dim)))
            factor = family_of({"model_type": "llama"}).unparse(config)["partial_rotary_factor"]
            assert int(head_dim * factor) == rotary_dim


def test_older_rope_scaling_wins_over_rope_parameters() -> None:
    both = {"model_type": "llama", "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2},
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    assert parse(both).layers[0].rope == RotaryEmbedding(128, 5e5, None, LinearScaling(2.0))


def test_yarn_falls_back_to_max_position_embeddings() -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0}
    fields = {"model_type": "qwen2", "max_position_embeddings": 4096, "rope_scaling": yarn}
    assert parse(fields).layers[0].rope.scaling == YarnScaling(4.0, 4096)
    outside = fields | {"original_max_position_embeddings": 512}
    assert parse(outside).layers[0].rope.scaling == YarnScaling(4.0, 512)
    ratio = outside | {"rope_scaling": {"rope_type": "yarn", "factor": None}}
    assert parse(ratio).layers[0].rope.scaling == YarnScaling(8.0, 512)


def test_the_head_of_a_seeing_gemma_is_tied_as_the_whole_says() -> None:
    assert parse({"model_type": "gemma3", "text_config": {}}).tie_word_embeddings
    assert not parse({"model_type": "gemma3", "text_config": {"tie_word_embeddings": False}}).tie_word_embeddings
    assert not parse({"model_type": "gemma3", "tie_word_embeddings": False,
                      "text_config": {"tie_word_embeddings": True}}).tie_word_embeddings


def folder_with(path: Path, config: object, generation: object = None) -> Path:
    for name, contents in (("config.json", config), ("generation_config.json", generation)):
        if contents is not None:
            text = contents if isinstance(contents, str) else json.dumps(contents)
            (path / name).write_text(text, encoding="utf-8")
    return path


def test_generation_config_says_what_ends_a_text(tmp_path: Path) -> None:
    config_json = read("llama-3.1-8b")
    config, returned = parse_config(folder_with(tmp_path, config_json))
    assert returned == config_json and config.eos_token_ids == (128001,)
    for given, eos in ((7, (7,)), ([7, 9], (7, 9)), (None, (128001,))):
        config, _ = parse_config(folder_with(tmp_path, config_json, {"eos_token_id": given, "temperature": 0.6}))
        assert config.eos_token_ids == eos
    assert parse_config(folder_with(tmp_path, config_json, {"temperature": 0.6}))[0].eos_token_ids == (128001,)


@pytest.mark.parametrize(
    ("config", "generation", "problem"),
    [
        (None, None, r"config.json cannot be read: No such file"),
        ("{", None, r"config.json is not JSON"),
        ("[1]", None, r"config.json holds list, not a JSON object"),
        ({}, None, r"config.json: no model_type; supported are llama, mistral, qwen2, qwen3, gemma3_text, gemma3"),
        ({"model_type": "gpt2"}, None, r'config.json: model_type "gpt2" is not supported; supported are llama, mis'),
        ({"model_type": ["llama"]}, None, r'model_type \["llama"\] is not supported'),
        ({"model_type": "llama", "vocab_size": "32000"}, None, r'config.json: vocab_size is "32000"; expected a pos'),
        ({"model_type": "llama"}, "nope", r"generation_config.json is not JSON"),
        ({"model_type": "llama"}, {"eos_token_id": "x"}, r'generation_config.json: eos_token_id is "x"; expected a t'),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, config: object, generation: object, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        parse_config(folder_with(tmp_path, config, generation))


def test_config_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        parse_config(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "fields", "problems"),
    [
        ("llama", {"hidden_size": "4096"}, ['hidden_size is "4096"; expected a positive integer.']),
        ("llama", {"hidden_size": 4096.0}, ["hidden_size is 4096.0; expected a positive integer."]),
        ("llama", {"hidden_size": True}, ["hidden_size is true; expected a positive integer."]),
        ("llama", {"vocab_size": 0, "num_hidden_layers": -1},
         ["vocab_size is 0; expected a positive integer.", "num_hidden_layers is -1; expected a positive integer."]),
        ("llama", {"vocab_size": None}, ["vocab_size is null; expected a positive integer."]),
        ("llama", {"num_key_value_heads": 5},
         ["num_key_value_heads is 5; expected a divisor of num_attention_heads, 32."]),
        ("llama", {"hidden_size": 98, "num_attention_heads": 3},
         ["hidden_size is 98; expected a multiple of num_attention_heads, 3, where head_dim is not given."]),
        ("llama", {"head_dim": 15}, ["head_dim 15 and partial_rotary_factor 1.0 make 15 rotated dimensions"]),
        ("llama", {"partial_rotary_factor": 1.5}, ["partial_rotary_factor 1.5 make 192 rotated dimensions"]),
        ("llama", {"partial_rotary_factor": 0.001}, ["partial_rotary_factor 0.001 make 0 rotated dimensions"]),
        ("llama", {"hidden_act": "mish"}, ['hidden_act is "mish"; expected one of silu, swish, gelu']),
        ("llama", {"torch_dtype": "float64"}, ['torch_dtype is "float64"; expected one of float32, bfloat16, float16']),
        ("llama", {"dtype": "int8"}, ['dtype is "int8"; expected one of']),
        ("llama", {"attention_bias": "no"}, ['attention_bias is "no"; expected true or false.']),
        ("llama", {"mlp_bias": 1}, ["mlp_bias is 1; expected true or false."]),
        ("llama", {"tie_word_embeddings": None}, ["tie_word_embeddings is null; expected true or false."]),
        ("llama", {"rms_norm_eps": "1e-6"}, ['rms_norm_eps is "1e-6"; expected a positive number.']),
        ("llama", {"rms_norm_eps": math.nan}, ["rms_norm_eps is NaN; expected a positive number."]),
        ("llama", {"eos_token_id": [1, "2"]}, ['eos_token_id is [1, "2"]; expected a token id, a list of them']),
        ("llama", {"rope_theta": 1}, ["rope_theta is 1; expected a number above 1."]),
        ("llama", {"rope_theta": math.inf}, ["rope_theta is Infinity; expected a number above 1."]),
        ("llama", {"rope_theta": 10 ** 400}, ["rope_theta is 1000"]),
        ("llama", {"rope_scaling": "linear"}, ['rope_scaling is "linear"; expected an object.']),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
         ['rope_scaling.type is "dynamic"; expected one of default, linear, llama3, yarn.']),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}},
         ['rope_parameters.rope_type is "longrope"; expected one of default, linear, llama3, yarn.']),
        ("llama", {"rope_scaling": {"rope_type": "linear"}},
         ["rope_scaling.factor is missing; expected a number, which rope_type linear needs."]),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
         ["low_freq_factor is missing", "high_freq_factor is missing"]),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                                    "high_freq_factor": 4.0}},
         ["rope_scaling.high_freq_factor is 4.0; expected a number above low_freq_factor, 4.0."]),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": "4"}}, ['rope_scaling.factor is "4"; expected']),
        ("qwen3", {"rope_parameters": {"full_attention": {"rope_type": "default"}}},
         ["rope_parameters.full_attention is {"]),
        ("qwen3", {"quantization_config": {"quant_method": "fp8"}},
         ['quantization_config is {"quant_method": "fp8"}; expected none: quantised checkpoints are not supported']),
        ("llama", {"quantization_config": {"kv_cache_scheme": FP8_CACHE, "config_groups": {"group_0": {}}}},
         ["quantization_config is {"]),
        ("llama", {"quantization_config": {"kv_cache_scheme": FP8_CACHE | {"type": "int"}, "config_groups": {}}},
         ["quantization_config is {"]),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": ["sliding_attention"]},
         ["sliding_window is not in use, but there are layers of sliding_attention; expected a positive integer."]),
        ("qwen2", {"num_hidden_layers": 2, "layer_types": ["full_attention"]},
         ['layer_types is ["full_attention"]; expected 2 (num_hidden_layers) times full_attention or sliding']),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": ["chunked_attention"]}, ["layer_types is"]),
        ("qwen2", {"num_hidden_layers": 1, "layer_types": [{}]}, ["layer_types is [{}]"]),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": -1}, ["max_window_layers is -1; expected"]),
        ("mistral", {"sliding_window": 0}, ["sliding_window is 0; expected a positive integer or null."]),
        ("mistral", {"sliding_window": "4096"}, ['sliding_window is "4096"; expected a positive integer or null.']),
        ("gemma3_text", {"use_bidirectional_attention": True},
         ["use_bidirectional_attention is true; expected none: attention is causal here."]),
        ("gemma3_text", {"hidden_activation": "mish"}, ['hidden_activation is "mish"']),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, ["query_pre_attn_scalar is 0; expected a positive number."]),
        ("gemma3_text", {"final_logit_softcapping": -30.0}, ["final_logit_softcapping is -30.0; expected a positive"]),
        ("gemma3_text", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
         ["rope_parameters.rope_type is", "rope_parameters.rope_theta is"]),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}},
         ['rope_parameters.full_attention.rope_type is "dynamic"; expected one of']),
        ("gemma3_text", {"sliding_window": None}, ["sliding_window is not in use, but there are layers"]),
        ("gemma3_text", {"sliding_window_pattern": 0}, ["sliding_window_pattern is 0; expected a positive integer."]),
        ("gemma3", {"text_config": [1]}, ["text_config is [1]; expected an object."]),
        ("gemma3", {"text_config": {"hidden_size": "x"}}, ['hidden_size is "x"; expected a positive integer.']),
        ("gemma3", {"quantization_config": {}, "text_config": {}}, ["quantization_config is {}"]),
    ],
)
def test_fields_that_are_refused(model_type: str, fields: dict, problems: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        parse({"model_type": model_type, **fields})
    lines = str(caught.value).splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert problem in line


def test_a_quantised_cache_alone_is_no_quantised_checkpoint() -> None:
    scheme = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": FP8_CACHE}
    assert parse({"model_type": "llama", "quantization_config": scheme}) == parse({"model_type": "llama"})


def test_all_problems_are_told_at_once() -> None:
    fields = {"model_type": "llama", "vocab_size": "a", "hidden_act": "mish", "num_key_value_heads": 7,
              "quantization_config": {}, "rope_scaling": {"rope_type": "su"}, "mlp_bias": 0, "dtype": "int4"}
    with pytest.raises(ValueError) as caught:
        parse(fields)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(fields) - 1
    for name in fields.keys() - {"model_type"}:
        assert sum(name in line.split(" is ")[0] for line in lines) == 1


def test_what_a_family_cannot_state_is_not_written() -> None:
    config = parse({"model_type": "llama", "num_hidden_layers": 2})
    with pytest.raises(ValueError, match=r"model_type llama cannot state this model's qk_norm True"):
        unparse_config(replace(config, qk_norm=True))
    with pytest.raises(ValueError, match="layers"):
        unparse_config(replace(config, layers=plain(2, RotaryEmbedding(128), 64)))
    with pytest.raises(ValueError, match='model_type "gpt2" is not supported'):
        unparse_config(replace(config, model_type="gpt2"))


LLAMA_FAMILY, GEMMA_FAMILY = family_of({"model_type": "llama"}), family_of({"model_type": "gemma3"})


def test_names() -> None:
    llama, gemma = partial(hf_name, LLAMA_FAMILY), partial(hf_name, GEMMA_FAMILY)
    assert llama("layers.3.attention.q_proj.weight") == "model.layers.3.self_attn.q_proj.weight"
    assert llama("layers.3.mlp_norm.weight") == "model.layers.3.post_attention_layernorm.weight"
    assert llama("layers.13.mlp.down_proj.bias") == "model.layers.13.mlp.down_proj.bias"
    assert llama("embedding.weight") == "model.embed_tokens.weight"
    assert llama("norm.weight") == "model.norm.weight"
    assert llama("output.weight") == llama("output.layer.weight") == "lm_head.weight"
    assert gemma("layers.0.attention.layer.q_norm.weight") == "model.layers.0.self_attn.q_norm.weight"
    assert gemma("layers.0.attention.norm.weight") == "model.layers.0.post_attention_layernorm.weight"
    assert gemma("layers.0.mlp_norm.weight") == "model.layers.0.pre_feedforward_layernorm.weight"
    assert gemma("layers.0.mlp.norm.weight") == "model.layers.0.post_feedforward_layernorm.weight"


def test_prefixes() -> None:
    layer, rest = "layers.0.self_attn.q_proj.weight", ("embed_tokens.weight", "norm.weight")
    wanted = {f"model.{name}" for name in (layer, *rest)} | {"lm_head.weight"}
    for family, prefix, head in [
        (LLAMA_FAMILY, "model.", "lm_head.weight"),
        (LLAMA_FAMILY, "", "lm_head.weight"),
        (GEMMA_FAMILY, "model.", "lm_head.weight"),
        (GEMMA_FAMILY, "language_model.model.", "language_model.lm_head.weight"),
        (GEMMA_FAMILY, "model.language_model.", "lm_head.weight"),
        (GEMMA_FAMILY, "language_model.", "lm_head.weight"),
    ]:
        names = [prefix + layer, *(prefix + name for name in rest), head]
        canonical = canonical_names(family, names)
        assert [*canonical] == names and {*canonical.values()} == wanted
    foreign = ["model.language_model.norm.weight", "transformer.h.0.weight", "model.layers_0", "score.weight"]
    assert canonical_names(LLAMA_FAMILY, foreign) == {name: name for name in foreign}


def test_names_left_out() -> None:
    buffers = ["model.layers.0.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq", "model.rotary_emb_local.inv_freq",
               "model.rotary_emb.full_attention_inv_freq"]
    sight = ["vision_tower.vision_model.head.weight", "multi_modal_projector.mm_soft_emb_norm.weight",
             "model.vision_tower.x", "model.multi_modal_projector.y"]
    assert canonical_names(GEMMA_FAMILY, [*buffers, *sight]) == {}
    assert canonical_names(LLAMA_FAMILY, [*buffers, *sight]) == {name: name for name in sight}


def test_tied_heads() -> None:
    both = ["model.embed_tokens.weight", "lm_head.weight"]
    assert canonical_names(LLAMA_FAMILY, both, tied=True) == {both[0]: both[0]}
    assert canonical_names(LLAMA_FAMILY, both) == {name: name for name in both}
    assert canonical_names(LLAMA_FAMILY, both[1:], tied=True) == {both[1]: both[0]}


def test_two_names_for_one_parameter_are_left_to_the_loader() -> None:
    names = ["norm.weight", "model.norm.weight"]
    assert canonical_names(LLAMA_FAMILY, names) == dict.fromkeys(names, "model.norm.weight")
