"""The engine's flags: each reaches the field that it is named for."""

import argparse
from dataclasses import fields
from pathlib import Path

import jax
import pytest

import maxlike
from maxlike.engine.config import EngineConfig
from maxlike.engine.flags import add_engine_flags, engine_options, memory_size, mesh_of_size
from maxlike.kernels.paged_attention import Xla
from maxlike.models.registry import parse_config

EMBEDDED = Path(maxlike.__file__).parent / "embedded"


def parsed(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_engine_flags(parser)
    return parser.parse_args(argv)


def test_without_flags_nothing_is_decided() -> None:
    config, options = engine_options(parsed(), str(EMBEDDED))
    assert config == EngineConfig()
    assert isinstance(options.pop("devices"), jax.sharding.Mesh)
    assert options == {"dtype": None, "kv_cache_dtype": None, "implementation": None, "adapter": None,
                       "adapter_mode": "merged"}


def test_each_flag_has_its_effect() -> None:
    config, options = engine_options(parsed(
        "--max-num-seqs", "3", "--max-num-batched-tokens", "17", "--max-model-len", "99", "--page-size", "32",
        "--kv-cache-memory", "1.5M", "--memory-share", "0.5", "--no-prefix-caching", "--tp", "2", "--dtype", "bfloat16",
        "--kv-cache-dtype", "int8", "--attention", "xla", "--adapter", "a/b", "--adapter-mode", "live"), str(EMBEDDED))
    assert config == EngineConfig(max_num_seqs=3, max_num_batched_tokens=17, max_model_len=99, page_size=32,
                                  kv_cache_memory=3 * 2**19, memory_share=0.5, enable_prefix_caching=False)
    assert engine_options(parsed("--num-pages", "7"), str(EMBEDDED))[0].num_pages == 7
    assert options.pop("devices").size == 2
    assert options == {"dtype": "bfloat16", "kv_cache_dtype": "int8", "implementation": Xla(), "adapter": "a/b",
                       "adapter_mode": "live"}
    # Those without a flag are the caller's.
    flags = {name.replace("no_prefix_caching", "enable_prefix_caching") for name in vars(parsed())}
    assert {field.name for field in fields(EngineConfig)} - flags == {"warm_up", "seed"}


@pytest.mark.parametrize(
    ("text", "size"), [("5", 5), ("2K", 2048), ("1.5MiB", 3 << 19), ("4G", 4 << 30), ("1GB", 1 << 30)])
def test_sizes(text: str, size: int) -> None:
    assert memory_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "4T", "4 potatoes", "nan", "1e9"])
def test_sizes_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed(f"--kv-cache-memory={text}")
    assert f"a size is expected, in bytes or as 512M or 4G; got {text!r}" in capsys.readouterr().err


def test_tensor_parallel_sizes_refused() -> None:
    config = parse_config(EMBEDDED)[0]
    with pytest.raises(ValueError, match="Legal sizes"):
        mesh_of_size(config, 3)
    assert mesh_of_size(config, 4).size == 4
