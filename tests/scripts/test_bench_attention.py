"""The attention benchmark runs, and says what it ran; how fast is not a test's business."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_attention.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


def test_report() -> None:
    done = run("--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--rounds", "2", "--page-size", "64",
               "--implementation", "xla", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["heads"], report["table_width"], report["platform"]) == ([2], 32, "cpu")
    assert report["implementation"] == "xla"
    assert len(report["results"]) == 5 and all(0 < r["ms_min"] <= r["ms"] for r in report["results"])
    (far,) = (r for r in report["results"] if r["case"] == "8 decodes at 2000")
    read, operations = 8 * 2001 * 2 * 16 * 4, 8 * 2001 * 4 * 2 * 16
    assert far["gb_s"] * far["ms"] * 1e6 == pytest.approx(read)
    assert far["tflop_s"] * far["ms"] * 1e9 == pytest.approx(operations)


def test_bad_input_takes_one_line() -> None:
    bad = {
        ("--heads", "6", "--kv-heads", "4"): "multiple of the KV heads",
        ("--rounds", "0"): "'0'",
        ("--implementation", "mosaic_gpu"): "q of float32 with pages of float32",
    }
    for arguments, says in bad.items():
        done = run(*arguments)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1


def test_figures_of_an_accelerator() -> None:
    spec = importlib.util.spec_from_file_location("bench_attention", SCRIPT)
    assert spec is not None and spec.loader is not None
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    args = bench._parser().parse_args(["--kv-heads", "1", "--head-dim", "16", "--cache-dtype", "bfloat16"])
    peaks = {"copy_gb_s": 1e-3, "matmul_tflop_s": 1e-3}
    decode = bench._result(("decode", ((1023, 1),) * 2, 4), {"maxlike": [1.0], "sdpa": [2.0]}, peaks, args)
    assert decode["gb_s"] == pytest.approx(2 * 1024 * 64 / 1e9) and decode["of_copy"] == decode["gb_s"] / 1e-3
    assert decode["ms_by_sdpa"] == 2000 and "of_matmul" not in decode
    prefill = bench._result(("prefill", ((100, 3),), 4), {"maxlike": [1.0]}, peaks, args)
    assert prefill["tflop_s"] == pytest.approx((101 + 102 + 103) * 4 * 4 * 16 / 1e12)
    assert prefill["of_matmul"] == prefill["tflop_s"] / 1e-3 and "of_copy" not in prefill
