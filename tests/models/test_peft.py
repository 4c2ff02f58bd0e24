"""Adapters in PEFT's format, against PEFT itself on top of `transformers`, and against its format read by hand."""

from __future__ import annotations

import json
import warnings
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import maxlike
from maxlike import ReturnLogits
from maxlike.mesh import make_mesh
from maxlike.models import parse_config, save_model
from maxlike.models.peft import add_adapter, load_adapter, save_adapter
from maxlike.models.safetensors import CheckpointError
from maxlike.nn.lora import LoraConfig, is_lora, lora_parameters, merge_lora
from maxlike.nn.transformer import DistributedTransformer
from tests.models import checkpoints

LENGTHS = (5, 11)
TOKENS = np.random.default_rng(0).integers(3, 1003, sum(LENGTHS)).astype(np.int32)
OFFSETS = np.cumsum([0, *LENGTHS]).astype(np.int32)


@dataclass(frozen=True)
class Case:
    """A family, what its adapter is, and how it runs here."""

    model_type: str
    adapter: dict[str, Any]
    use_subgraphs: bool = False
    n_devices: int = 1
    fsdp: int = 1


CASES = {
    # q, k, v with biases, the head, ranks and alphas by pattern; 8 devices share 2 KV heads.
    "llama": Case("llama", dict(
        r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "v_proj", "down_proj", "lm_head"],
        rank_pattern={"k_proj": 2, "down_proj": 3}, alpha_pattern={"lm_head": 10}), use_subgraphs=True, n_devices=8),
    "qwen3": Case("qwen3", dict(r=5, lora_alpha=10, target_modules=r".*layers\.[02]\.(self_attn\.[qo]|mlp\.gate)_proj",
                                use_rslora=True), n_devices=4, fsdp=2),
    "gemma3_text": Case("gemma3_text", dict(r=8, lora_alpha=16, target_modules="all-linear"), use_subgraphs=True),
}

# PEFT asks transformers by a name that this deprecates.
peft_is_behind = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(scope="module")
def oracle() -> Any:
    """Skips where PEFT, torch or transformers are not there."""
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    from tests.models import oracle

    return oracle


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`base(model_type)` is a folder with a checkpoint."""
    folders: dict[str, Path] = {}

    def folder(model_type: str) -> Path:
        if model_type not in folders:
            folders[model_type] = tmp_path_factory.mktemp(model_type)
            checkpoints.write(folders[model_type], checkpoints.config_of(model_type))
        return folders[model_type]

    return folder


def load(folder: Path, case: Case, devices: list[jax.Device]) -> DistributedTransformer:
    config, _ = parse_config(folder)
    mesh = make_mesh(devices[:case.n_devices], fsdp=case.fsdp, n_heads=config.num_attention_heads,
                     n_kv_heads=config.num_key_value_heads)
    return maxlike.load(folder, devices=mesh, use_subgraphs=case.use_subgraphs, return_logits=ReturnLogits.ALL)


def logits(model: DistributedTransformer) -> np.ndarray:
    return np.asarray(model(TOKENS, None, None, OFFSETS)[0][1])


def torch_logits(model: Any, oracle: Any) -> np.ndarray:
    return np.concatenate([oracle.all_logits(model, part) for part in np.split(TOKENS, OFFSETS[1:-1])])


def close(ours: np.ndarray, theirs: np.ndarray) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=max(1e-4, 2e-5 * np.abs(theirs).max()))


def fill(model: DistributedTransformer) -> None:
    """Draws every A and B by its name; padding stays zero."""
    for names, stacked, param in lora_parameters(model):
        value, logical = param.get_value(), param.get_metadata("logical_shape")
        drawn = [np.random.default_rng(zlib.crc32(name.encode())).normal(0, 0.1, logical).astype(np.float32)
                 for name in names]
        drawn = [np.pad(x, [(0, full - part) for full, part in zip(value.shape[stacked:], logical, strict=True)])
                 for x in drawn]
        param.set_value(jax.device_put(np.stack(drawn) if stacked else drawn[0], value.sharding))


def peft_model(case: Case, folder: Path, oracle: Any) -> Any:
    """PEFT's model, its adapter drawn so that all of it matters."""
    import peft
    import torch

    model = peft.get_peft_model(oracle.load(folder), peft.LoraConfig(task_type="CAUSAL_LM", **case.adapter))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(0, 0.1)
    return model


@peft_is_behind
@pytest.mark.parametrize("name", CASES)
def test_what_peft_saves(name: str, base: Any, oracle: Any, tmp_path: Path, devices: list[jax.Device]) -> None:
    """Logits and gradients of an adapter that PEFT saved are PEFT's, live and merged; so is the merged checkpoint."""
    import torch

    case = CASES[name]
    folder = base(case.model_type)
    theirs = peft_model(case, folder, oracle)
    with warnings.catch_warnings():
        # Beside an adapter on the head it saves a copy of the head.
        warnings.filterwarnings("ignore", "Setting `save_embedding_layers`")
        theirs.save_pretrained(tmp_path / "adapter")
    config, _ = parse_config(folder)
    model = load(folder, case, devices)
    plain = logits(model)
    read = load_adapter(model, config, tmp_path / "adapter")
    assert (read.rank, read.use_rslora) == (case.adapter["r"], case.adapter.get("use_rslora", False))
    expected = torch_logits(theirs, oracle)
    assert np.abs(plain - expected).max() > 0.5  # without the adapter it would not pass
    close(logits(model), expected)

    # The gradients of the cross entropy of each next token.
    for part in np.split(TOKENS.astype(np.int64), OFFSETS[1:-1]):
        out = theirs(input_ids=torch.tensor(part[None]), use_cache=False).logits[0, :-1]
        torch.nn.functional.cross_entropy(out, torch.tensor(part[1:]), reduction="sum").backward()
    wanted = {n.removeprefix("base_model.model.").replace(".default", ""): p.grad.numpy()
              for n, p in theirs.named_parameters() if ".lora_" in n}
    ours = gradients(model, config, tmp_path / "gradients")
    assert ours.keys() == wanted.keys()
    for tensor, gradient in wanted.items():
        assert np.linalg.norm(ours[tensor] - gradient) <= 1e-4 * np.linalg.norm(gradient), tensor

    merge_lora(model)
    close(logits(model), expected)
    save_model(model, config, tmp_path / "merged")
    merged = theirs.merge_and_unload().state_dict()
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert written.keys() == {n for n in merged if n != "lm_head.weight" or not config.tie_word_embeddings}
    for tensor, value in written.items():
        np.testing.assert_allclose(value, merged[tensor].numpy(), rtol=0, atol=2e-6, err_msg=tensor)


def gradients(model: DistributedTransformer, config: Any, folder: Path) -> dict[str, np.ndarray]:
    """By PEFT's names: what `save_adapter` writes of a model with gradients for an adapter."""
    targets = jnp.asarray(np.roll(TOKENS, -1))
    weights = jnp.ones(len(TOKENS)).at[OFFSETS[1:] - 1].set(0)
    graphdef, lora, rest = nnx.split(model, lambda path, _: is_lora(str(path[-1])), ...)

    @jax.jit
    def of(lora: Any, rest: Any) -> Any:
        def loss(lora: Any) -> jax.Array:
            model = nnx.merge(graphdef, lora, rest)
            (_, out, _), _ = model(TOKENS, None, None, OFFSETS)
            with jax.sharding.use_abstract_mesh(model.mesh.abstract_mesh):
                out = jax.nn.log_softmax(out)
                return -jnp.sum(weights * jnp.sum(out * jax.nn.one_hot(targets, out.shape[1]), axis=1))
        return jax.grad(loss)(lora)

    save_adapter(nnx.merge(graphdef, of(lora, rest), rest), config, folder)
    return {name.removeprefix("base_model.model."): value
            for name, value in load_file(folder / "adapter_model.safetensors").items()}


@peft_is_behind
@pytest.mark.parametrize("name", CASES)
def test_what_peft_loads(name: str, base: Any, oracle: Any, tmp_path: Path, devices: list[jax.Device]) -> None:
    import peft

    case = CASES[name]
    folder = base(case.model_type)
    config, _ = parse_config(folder)
    model = load(folder, case, devices)
    a = case.adapter
    names = add_adapter(model, config, LoraConfig(
        a["r"], a["lora_alpha"], a["target_modules"], rank_pattern=a.get("rank_pattern", {}),
        alpha_pattern=a.get("alpha_pattern", {}), use_rslora=a.get("use_rslora", False)), nnx.Rngs(0))
    fill(model)
    save_adapter(model, config, tmp_path, base_model_name="some/base")
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "some/base"
    if isinstance(a["target_modules"], list):
        assert written["target_modules"] == sorted(a["target_modules"])
        assert (written["r"], written["rank_pattern"]) == (4, {"k_proj": 2, "down_proj": 3})
        assert (written["lora_alpha"], written["alpha_pattern"]) == (6, {"lm_head": 10})
    theirs = peft.PeftModel.from_pretrained(oracle.load(folder), tmp_path)
    adapted = [n for n, module in theirs.named_modules() if hasattr(module, "lora_A")]
    assert len(adapted) == len(names)
    close(logits(model), torch_logits(theirs, oracle))


# -- the format, without PEFT


def adapter_of(folder: Path, config: dict[str, Any], *, rank: int = 2, modules: tuple[str, ...] = ("q_proj", "v_proj"),
               dtype: Any = np.float32, **fields: Any) -> dict[str, np.ndarray]:
    """Writes an adapter for a checkpoint of `config`, by hand; returns its tensors."""
    rng = np.random.default_rng(3)
    D, H = config["hidden_size"], config["head_dim"]
    outs = {"q_proj": config["num_attention_heads"] * H, "v_proj": config["num_key_value_heads"] * H}
    tensors = {}
    for i in range(config["num_hidden_layers"]):
        for module in modules:
            name = f"base_model.model.model.layers.{i}.self_attn.{module}"
            tensors[f"{name}.lora_A.weight"] = rng.normal(0, 0.1, (rank, D)).astype(dtype)
            tensors[f"{name}.lora_B.weight"] = rng.normal(0, 0.1, (outs[module], rank)).astype(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(
        dict(peft_type="LORA", r=rank, lora_alpha=4, target_modules=list(modules)) | fields))
    return tensors


@pytest.fixture(scope="module")
def model(base: Any, devices: list[jax.Device]) -> DistributedTransformer:
    """A Llama without adapter, whose tests leave it so."""
    return load(base("llama"), CASES["gemma3_text"], devices)


@pytest.mark.parametrize(("stored", "asked", "kept"), [
    (np.float32, None, jnp.float32), (np.float16, None, jnp.float32), (ml_dtypes.bfloat16, None, jnp.bfloat16),
    (np.float32, "bfloat16", jnp.bfloat16)])
def test_a_saved_adapter_is_the_loaded_one(stored: Any, asked: Any, kept: Any, base: Any, tmp_path: Path,
                                           devices: list[jax.Device]) -> None:
    config, fields = parse_config(base("llama"))
    tensors = adapter_of(tmp_path / "given", fields, dtype=stored)
    model = load(base("llama"), CASES["gemma3_text"], devices)
    load_adapter(model, config, tmp_path / "given", dtype=asked)
    assert {param.get_value().dtype for _, _, param in lora_parameters(model)} == {jnp.dtype(kept)}
    save_adapter(model, config, tmp_path / "saved")
    written = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert written.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(written[name], value.astype(kept), err_msg=name)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize(("fields", "says"), [
    (dict(peft_type="LOHA"), 'peft_type is "LOHA"; only LORA'),
    (dict(peft_type=None), "peft_type is null"),
    (dict(use_dora=True), "use_dora is true, which is not supported"),
    (dict(bias="lora_only"), 'bias is "lora_only"'),
    (dict(lora_bias=True), "lora_bias is true"),
    (dict(modules_to_save=["lm_head"]), r'modules_to_save is \["lm_head"\]'),
    (dict(layers_to_transform=[0]), r"layers_to_transform is \[0\]"),
    (dict(fan_in_fan_out=True), "fan_in_fan_out is true"),
    (dict(init_lora_weights="pissa"), 'init_lora_weights is "pissa", which changes the base'),
    (dict(trainable_token_indices=[3]), "trainable_token_indices"),
    (dict(made_up_tomorrow={"x": 1}), "made_up_tomorrow is "),
    (dict(r=0), "rank must be a whole number"),
    (dict(target_modules=None), "target_modules is empty"),
    (dict(target_modules=["c_attn"]), "names 'c_attn', but no linear layer is called so"),
    (dict(rank_pattern={"q_proj": 3}), r"q_proj.lora_A.weight' has shape \[2, 64\]; the model and .* mean \[3, 64\]"),
    (dict(target_modules=["q_proj", "v_proj", "up_proj"]),
     "'base_model.model.model.layers.2.mlp.up_proj.lora_B.weight' is missing"),
    (dict(target_modules=["q_proj", "embed_tokens"]),
     r"v_proj.lora_A.weight' is unexpected: .* adapter_config.json does not target it"),
])
def test_configurations_refused(fields: dict[str, Any], says: str, model: DistributedTransformer, base: Any,
                                tmp_path: Path) -> None:
    config, config_json = parse_config(base("llama"))
    adapter_of(tmp_path, config_json, **fields)
    with pytest.raises(CheckpointError, match=says) as caught:
        load_adapter(model, config, tmp_path)
    assert str(caught.value).splitlines()[0].endswith(f"with the adapter in {tmp_path}:")
    assert not list(lora_parameters(model))


def test_fields_without_effect_are_no_hindrance(base: Any, tmp_path: Path, model: DistributedTransformer) -> None:
    config, config_json = parse_config(base("llama"))
    adapter_of(tmp_path, config_json, lora_dropout=0.1, task_type="CAUSAL_LM", megatron_core="megatron.core",
               loftq_config={"x": 1}, use_dora=False, layers_to_transform=None,
               target_modules=["q_proj", "v_proj", "zz"])
    graphdef, state = nnx.split(model)
    assert load_adapter(nnx.merge(graphdef, state), config, tmp_path).alpha == 4


def test_everything_wrong_is_told_at_once(base: Any, tmp_path: Path, model: DistributedTransformer) -> None:
    config, config_json = parse_config(base("llama"))
    tensors = adapter_of(tmp_path, config_json)
    q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"
    del tensors[q.format(0, "B")]
    tensors[q.format(1, "A")] = np.zeros((2, 63), np.float32)
    tensors[q.format(2, "A")] = np.zeros((2, 64), np.int32)
    tensors[q.format(3, "A")] = np.zeros((2, 64), np.float32)  # there is no such layer
    tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = np.zeros((2, 1003), np.float32)
    tensors[q.format(0, "A").removeprefix("base_model.model.model.")] = np.zeros((2, 64), np.float32)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(
        dict(peft_type="LORA", r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"], use_dora=True)))
    with pytest.raises(CheckpointError) as caught:
        load_adapter(model, config, tmp_path)
    problems = "\n".join(caught.value.problems)
    for says in ("use_dora is true", f"{q.format(0, 'B')}' is missing", f"{q.format(1, 'A')}' has shape [2, 63]",
                 f"{q.format(2, 'A')}' is int32", f"{q.format(3, 'A')}' is unexpected: there is no such linear layer",
                 "lora_embedding_A' is unexpected: neither A nor B", "both mean"):
        assert says in problems, says
    assert len(caught.value.problems) == 7 and not list(lora_parameters(model))


def test_damaged_and_missing_files(base: Any, tmp_path: Path, model: DistributedTransformer) -> None:
    config, config_json = parse_config(base("llama"))
    for name, spoil, says in (
            ("cut", lambda folder: (folder / "adapter_model.safetensors").write_bytes(
                (folder / "adapter_model.safetensors").read_bytes()[:-10]), "cut short"),
            ("bin", lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
             "adapter_model.safetensors is missing; there is only adapter_model.bin"),
            ("none", lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json cannot be read"),
            ("text", lambda folder: (folder / "adapter_config.json").write_text("{"), "is not JSON")):
        folder = tmp_path / name
        adapter_of(folder, config_json)
        spoil(folder)
        with pytest.raises(ValueError, match=says):
            load_adapter(model, config, folder)
    with pytest.raises(ValueError, match="there is no folder"):
        load_adapter(model, config, tmp_path / "nowhere")
    assert not list(lora_parameters(model))


def test_a_tied_head_is_refused(base: Any, tmp_path: Path, devices: list[jax.Device]) -> None:
    config, _ = parse_config(base("gemma3_text"))
    model = load(base("gemma3_text"), CASES["gemma3_text"], devices)
    for target in ("lm_head", "output"):
        with pytest.raises(ValueError, match="output is the head, and its weight is the embedding's"):
            add_adapter(model, config, LoraConfig(target_modules=["q_proj", target]), nnx.Rngs(0))
    assert not list(lora_parameters(model))


def test_models_with_and_without_adapter_are_saved_each_by_its_own(base: Any, tmp_path: Path, devices: Any,
                                                                  model: DistributedTransformer) -> None:
    config, _ = parse_config(base("llama"))
    with pytest.raises(ValueError, match="no adapter to save"):
        save_adapter(model, config, tmp_path)
    adapted = load(base("llama"), CASES["qwen3"], devices)
    add_adapter(adapted, config, LoraConfig(target_modules=r"model\.layers\.1\.self_attn\.q_proj|lm_head"), nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"has an adapter \(layers.1.attention.q_proj and others\): merge_lora"):
        save_model(adapted, config, tmp_path)
    assert not list(tmp_path.iterdir())
    save_adapter(adapted, config, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["target_modules"] == ["lm_head", "model.layers.1.self_attn.q_proj"]  # not the q_proj of all layers


@pytest.mark.parametrize("name", ["lm_head.weight", "lm_head.base_layer.weight", "model.embed_tokens.weight"])
def test_a_base_that_is_saved_too_must_be_the_models(name: str, base: Any, tmp_path: Path,
                                                     model: DistributedTransformer) -> None:
    config, config_json = parse_config(base("llama"))
    tensors = adapter_of(tmp_path, config_json)
    own = load_file(base("llama") / "model.safetensors")[name.replace("base_layer.", "")]
    for value, says in ((own, None), (own + np.eye(1, 64, dtype=np.float32), "differs from the model's own"),
                        (own[:-1], r"has shape \[1002, 64\], the model's own \[1003, 64\]")):
        save_file(tensors | {f"base_model.model.{name}": value}, tmp_path / "adapter_model.safetensors")
        adapted = nnx.merge(*nnx.split(model))
        if says is None:
            load_adapter(adapted, config, tmp_path)
        else:
            with pytest.raises(CheckpointError, match=f"{name}' {says}"):
                load_adapter(adapted, config, tmp_path)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_adapters_of_the_model_that_sees(prefix: str, base: Any, tmp_path: Path, devices: list[jax.Device]) -> None:
    """Its text model is called otherwise, by the tensors and perhaps by a regular expression."""
    config, config_json = parse_config(base("gemma3_text"))
    tensors = adapter_of(tmp_path / "text", config_json)
    adapter_of(tmp_path / "whole", config_json, target_modules=rf"{prefix}layers\.\d+\.self_attn\.(q|v)_proj".replace(
        "model.", r"model\."))
    renamed = {name.replace("base_model.model.model.", f"base_model.model.{prefix}"): x for name, x in tensors.items()}
    save_file(renamed, tmp_path / "whole" / "adapter_model.safetensors")
    outputs = []
    for folder in ("text", "whole"):
        model = load(base("gemma3_text"), CASES["gemma3_text"], devices)
        load_adapter(model, config, tmp_path / folder)
        outputs.append({names[0]: np.asarray(param.get_value()) for names, _, param in lora_parameters(model)})
    assert outputs[0].keys() == outputs[1].keys() and len(outputs[0]) > 0
    for name, value in outputs[0].items():
        np.testing.assert_array_equal(value, outputs[1][name])
