"""`maxlike plan` as a user has it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import maxlike.cli
from maxlike.plan.options import Serving, Training
from tests.plan.known import CONFIGS
from tests.tpu_compile import requires_libtpu

LLAMA = str(CONFIGS["llama-3.1-8b"])


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    try:
        code = maxlike.cli.main(["plan", *argv])
    except SystemExit as stopped:
        code = int(stopped.code or 0)
    told = capsys.readouterr()
    return code, told.out, told.err


def test_flags_are_options() -> None:
    from maxlike.plan.command import options_of

    def options(*argv: str) -> Serving | Training:
        return options_of(maxlike.cli._parser().parse_args(["plan", "--topology", "v5e:2x4", *argv]))

    found = options("--tp", "4", "--data", "2", "--dtype", "float32", "--cache-dtype", "int8", "--max-seqs", "7",
                    "--max-len", "99", "--max-batched-tokens", "77", "--page-size", "32", "--context", "9",
                    "--memory-share", "0.5", "--kv-cache-memory", "1G")
    assert isinstance(found, Serving)
    assert (found.tp, found.data, found.dtype, found.cache_dtype, found.context) == (4, 2, "float32", "int8", 9)
    engine = found.engine
    assert (engine.max_num_seqs, engine.max_model_len, engine.max_num_batched_tokens) == (7, 99, 77)
    assert (engine.page_size, engine.memory_share, engine.kv_cache_memory) == (32, 0.5, 2**30)
    # As `serve` calls them.
    assert options("--max-num-seqs", "7", "--max-model-len", "99", "--kv-cache-dtype", "int8") == options(
        "--max-seqs", "7", "--max-len", "99", "--cache-dtype", "int8")
    assert options("--train", "--tp", "2", "--data", "2", "--fsdp", "2", "--tokens-per-batch", "64", "--remat", "dots",
                   "--accumulation", "3", "--optimizer", "lion", "--lora-rank", "5", "--dtype", "float32") == Training(
        tp=2, data=2, fsdp=2, tokens_per_batch=64, remat="dots", accumulation=3, optimizer="lion", lora_rank=5,
        dtype="float32")


def test_a_plan_and_a_sweep(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, err = run(capsys, "--model", LLAMA, "--topology", "h200:2", "--json")
    found = json.loads(out)
    assert (code, err, found["fits"], found["mesh"]) == (0, "", True, {"model": 2})
    assert found["steps"][0]["binds"] == "memory" and found["chip"]["source"].startswith("https://www.nvidia.com/")
    # A GPU too small: that is no error, but a code that a script can see. What is suggested is taken.
    code, out, err = run(capsys, "--model", LLAMA, "--topology", "a100:2", "--tp", "1", "--dtype", "float32",
                         "--max-len", "131072", "--max-seqs", "1024", "--json")
    found = json.loads(out)
    assert (code, err, found["fits"], found["steps"]) == (1, "", False, [])
    assert "--tp 2" in found["suggestions"] and found["problem"]
    for suggestion in found["suggestions"]:
        argv = ["--model", LLAMA, "--topology", "a100:2", "--tp", "1", "--dtype", "float32", "--max-len", "131072",
                "--max-seqs", "1024", *suggestion.split()]  # of a flag given twice the last one counts
        assert run(capsys, *argv)[0] == 0, suggestion
    code, out, err = run(capsys, "--model", LLAMA, "--sweep", "v6e:2x2", "h200:2", "--plot", str(tmp_path / "s.png"))
    assert (code, err) == (0, "") and (tmp_path / "s.png").exists()
    assert {line.split()[0] for line in out.splitlines()[2:]} == {"v6e:2x2", "h200:2"}


def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for argv, says in (
        ([], "--topology --sweep is required"),
        (["--topology", "v5e"], "2 dimensions, as v5e:4x8"),
        (["--topology", "h200:8", "--remat", "none"], "--remat is for --train"),
        (["--topology", "h200:8", "--train", "--max-seqs", "8"], "--max-seqs is for serving"),
        (["--topology", "h200:8", "--plot", "x.png"], "give --sweep"),
        (["--sweep", "h200:8", "--data", "2"], "leave --data out"),
        (["--sweep", "h200:8", "--plot", "x.gif"], "ends in .png"),
        (["--sweep", "h200:8", "--train", "--tp", "2", "--fsdp", "8"], "No mesh of h200:8 suits"),
        (["--sweep", "cpu"], "--topology cpu:N"),
        (["--topology", "h200:8", "--model", str(tmp_path / "none")], "cannot be read"),
    ):
        code, out, err = run(capsys, *argv)
        assert code == 2 and out == "" and err.count("\n") == 1 and says in err, err


@requires_libtpu
def test_the_compiler_is_quiet_in_a_bare_environment() -> None:
    """What libtpu wants of the environment the command sees to itself."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("TPU_", "ALLOW_", "JAX_"))}
    command = [sys.executable, "-m", "maxlike", "plan", "--topology"]
    done = subprocess.run([*command, "v5e:1x3"], env=bare, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("maxlike: There is no topology v5e:1x3") and done.stderr.count("\n") == 1
    small = ["--max-num-seqs", "1", "--max-num-batched-tokens", "16", "--max-model-len", "64"]
    done = subprocess.run([*command, "v5e:1x1", *small], env=bare, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")


def test_no_accelerator_is_started() -> None:
    """Whatever the environment asks for: there is none here."""
    command = [sys.executable, "-m", "maxlike", "plan", "--topology", "h200:1"]
    done = subprocess.run(command, env={**os.environ, "JAX_PLATFORMS": "cuda"}, capture_output=True, text=True,
                          timeout=300)
    assert done.returncode == 0 and done.stdout.endswith("It fits.\n"), done.stderr
