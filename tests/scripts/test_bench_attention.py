"""The attention benchmark runs, and says what it ran; how fast is not a test's business."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, ROOT / "scripts" / "bench_attention.py", *arguments], env=environment,
                          capture_output=True, text=True)


def test_report() -> None:
    done = run("--heads", "2", "--kv-heads", "1", "--head-dim", "16", "--rounds", "2", "--page-size", "64", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["heads"], report["table_width"], report["platform"]) == (2, 32, "cpu")
    assert len(report["results"]) == 5 and all(0 < r["ms_min"] <= r["ms"] for r in report["results"])
    (far,) = (r for r in report["results"] if r["case"] == "8 decodes at 2000")
    read = 8 * 2001 * 2 * 16 * 4
    assert abs(far["gb_s"] * far["ms"] * 1e6 - read) < 1e-6 * read


def test_bad_input_takes_one_line() -> None:
    bad = {("--heads", "6", "--kv-heads", "4"): "multiple of the KV heads", ("--rounds", "0"): "'0'"}
    for arguments, says in bad.items():
        done = run(*arguments)
        assert done.returncode == 2 and says in done.stderr and len(done.stderr.splitlines()) == 1
