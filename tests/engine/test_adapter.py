"""An engine over a model with an adapter: merged and live, from `LLM` to the command line and the server."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import maxlike
from maxlike import LLM, SamplingParams
from maxlike.cli import main
from maxlike.engine.async_engine import AsyncEngine
from maxlike.models import parse_config, save_model
from maxlike.models.peft import add_adapter, load_adapter, save_adapter
from maxlike.nn.lora import LoraConfig, lora_parameters, merge_lora
from maxlike.serve import server
from maxlike.serve.service import Service
from tests.compilation_cache import compiling_once
from tests.models import checkpoints
from tests.serve.fake_engine import FakeEngine
from tests.serve.serving import serving

PROMPTS = [[5, 6, 7], list(range(3, 40)), [900]]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = dict(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=64, num_pages=8,
                             enable_prefix_caching=False)


@dataclass(frozen=True)
class Folders:
    """A checkpoint, an adapter for it, and the checkpoint with the adapter merged."""

    base: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="module", autouse=True)
def cached(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with compiling_once(tmp_path_factory.mktemp("cache")):
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, devices: list[jax.Device]) -> Folders:
    base, adapter, merged = (tmp_path_factory.mktemp("made") / name for name in ("base", "adapter", "merged"))
    checkpoints.write(base, checkpoints.config_of("llama"))
    config, _ = parse_config(base)
    model = maxlike.load(base, devices=devices[:1])
    add_adapter(model, config, LoraConfig(4, 8, ["q_proj", "v_proj", "down_proj", "lm_head"]), nnx.Rngs(0))
    for names, _, param in lora_parameters(model):
        rng = np.random.default_rng(zlib.crc32(names[0].encode()))
        value = param.get_value()
        param.set_value(jax.device_put(rng.normal(0, 0.1, value.shape).astype(np.float32), value.sharding))
    save_adapter(model, config, adapter)
    merge_lora(model)
    save_model(model, config, merged)
    return Folders(base, adapter, merged)


def engine(model: Path, devices: Any, **options: Any) -> LLM:
    return LLM(model, devices=devices, **SMALL, **options)


def tokens(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY, use_tqdm=False)]


@pytest.fixture(scope="module")
def expected(folders: Folders, devices: list[jax.Device]) -> list[list[int]]:
    """Of the checkpoint that is merged on disk."""
    found = tokens(engine(folders.merged, devices[:1]))
    assert found != tokens(engine(folders.base, devices[:1]))
    return found


@pytest.mark.parametrize(("options", "n_devices"), [
    ({}, 1), (dict(adapter_mode="live"), 1), (dict(adapter_mode="live", use_subgraphs=True), 4),
    (dict(use_subgraphs=True), 4)])
def test_tokens_are_those_of_the_merged_checkpoint(options: dict[str, Any], n_devices: int, folders: Folders,
                                                   expected: list[list[int]], devices: list[jax.Device]) -> None:
    llm = engine(folders.base, devices[:n_devices], adapter=folders.adapter, **options)
    assert bool(list(lora_parameters(llm.engine.model))) == ("adapter_mode" in options)
    assert tokens(llm) == expected


def test_weights_are_exchanged_under_an_adapter(folders: Folders, expected: list[list[int]],
                                                devices: list[jax.Device]) -> None:
    base = maxlike.load(folders.base, devices=devices[:1])
    # A merged model is of the base's structure: it takes the base's weights.
    merged = engine(folders.base, devices[:1], adapter=folders.adapter)
    merged.update_weights(base)
    plain = tokens(merged)
    assert plain == tokens(engine(folders.base, devices[:1]))
    # A live one takes the adapter's alone.
    live = engine(folders.base, devices[:1], adapter=folders.adapter, adapter_mode="live")
    own = {names[0]: np.asarray(param.get_value()) for names, _, param in lora_parameters(live.engine.model)}
    live.update_weights({name: np.zeros_like(value) for name, value in own.items() if name.endswith("lora_b")})
    assert tokens(live) == plain
    live.update_weights(own)
    assert tokens(live) == expected
    # Or all from a model that has one.
    load_adapter(base, parse_config(folders.base)[0], folders.adapter)
    live.update_weights({name: -value for name, value in own.items()})
    live.update_weights(base)
    assert tokens(live) == expected


def test_a_live_adapter_is_kept_in_the_models_dtype(folders: Folders, devices: list[jax.Device]) -> None:
    llm = engine(folders.base, devices[:1], adapter=folders.adapter, adapter_mode="live", dtype="bfloat16")
    assert {param.get_value().dtype.name for _, _, param in lora_parameters(llm.engine.model)} == {"bfloat16"}


@pytest.mark.parametrize(("options", "says"), [
    (dict(adapter_mode="live"), "adapter_mode='live' says how an adapter is applied, and none was given"),
    (dict(adapter="nowhere", adapter_mode="both"), "adapter_mode is one of merged, live; got 'both'"),
    (dict(adapter="./nowhere"), "there is no folder './nowhere'"),
])
def test_options_refused(options: dict[str, Any], says: str, folders: Folders) -> None:
    with pytest.raises(ValueError, match=says):
        LLM(folders.base, **options)


def test_generate_takes_an_adapter(folders: Folders, expected: list[list[int]],
                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--model", str(folders.base), "--adapter", str(folders.adapter), "--adapter-mode", "live",
                 "--prompt-ids", "5,6,7", "--max-new-tokens", "12", "--tp", "1", "--json"]) == 0
    ids = json.loads(capsys.readouterr().out)["token_ids"]
    assert ids == expected[0][:len(ids)] and len(ids) > 3  # it may end at the end of text
    assert main(["generate", "--model", str(folders.base), "--adapter", str(folders.base), "--prompt-ids", "5"]) == 2
    assert "adapter_config.json cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "name"), [([], "adapter"), (["--served-model-name", "mine"], "mine")])
def test_the_server_calls_itself_by_the_adapter(flags: list[str], name: str, folders: Folders,
                                                monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[dict[str, Any]] = []

    def load(model: str, config: Any, **options: Any) -> FakeEngine:
        loaded.append(options)
        return FakeEngine()

    services: list[Service] = []
    monkeypatch.setattr(server, "run_server", lambda service, bound: services.append(service))
    monkeypatch.setattr(AsyncEngine, "from_model", load)
    assert main(["serve", str(folders.base), "--port", "0", "--adapter", str(folders.adapter), *flags]) == 0
    assert (loaded[0]["adapter"], loaded[0]["adapter_mode"]) == (str(folders.adapter), "merged")
    assert (services[0].config.served_model_name, services[0].config.base_model_name) == (name, "base")


def test_the_servers_card_names_the_base() -> None:
    for base in ("base", None):
        with serving(FakeEngine(), served_model_name="adapter", base_model_name=base) as (client, _):
            (card,) = client.get("/v1/models").json()["data"]
            assert (card["id"], card["parent"]) == ("adapter", base)
            assert client.get("/v1/models/adapter").json() == card
