"""The benchmark on a toy shape: its figures fit together, the engines do the same work, errors take one line."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_decode.py"
QUICK = ["--rounds", "3", "--steps", "3", "--prompt-tokens", "32", "--context", "20"]
HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))

# Of the tiny preset, by hand: embedding; two layers of q, k, v, o, of gate, up, down, and of two norms; final norm.
EMBEDDING = 512 * 128
PARAMETERS = EMBEDDING + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128 + 2 * 128) + 128


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_decode", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, SCRIPT, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    done = run("--shape", "tiny", "--dtype", "bfloat16", "--batch", "1,3", "--json", *QUICK)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_report_states_what_was_run(report: dict[str, Any]) -> None:
    assert {name: report[name] for name in ("shape", "batch", "prompt_tokens", "context", "steps", "tp")} == {
        "shape": "tiny", "batch": [1, 3], "prompt_tokens": 32, "context": 20, "steps": 3, "tp": 1}
    (of_dtype,) = report["runs"]
    assert of_dtype["dtype"] == "bfloat16" and len(of_dtype["bandwidth_gb_s_rounds"]) == 3
    assert [(r["phase"], r["batch"]) for r in of_dtype["results"]] == [("prefill", 1), ("decode", 1), ("decode", 3)]
    assert list(of_dtype["engines"]) == ["maxlike", "transformers"][:1 + HAS_TRANSFORMERS]


def test_engines_hold_the_same_model(report: dict[str, Any]) -> None:
    for about in report["runs"][0]["engines"].values():
        assert about["weight_bytes"] == about["streamed_bytes"] == 2 * PARAMETERS  # tied: the embedding is the head
    # On CPU our cache is float32; transformers' is in the model's dtype.
    per_token = [about["kv_bytes_per_token"] for about in report["runs"][0]["engines"].values()]
    assert per_token == [2 * 2 * 4 * 16 * 4, 2 * 2 * 4 * 16 * 2][:len(per_token)]


def test_figures_fit_together(report: dict[str, Any]) -> None:
    (of_dtype,) = report["runs"]
    bandwidth = statistics.median(of_dtype["bandwidth_gb_s_rounds"])
    assert of_dtype["bandwidth_gb_s"] == bandwidth > 0
    for result in of_dtype["results"]:
        for engine, about in of_dtype["engines"].items():
            figures = result[engine]
            assert len(figures["tok_s_rounds"]) == 3 and min(figures["tok_s_rounds"]) > 0
            assert figures["tok_s"] == pytest.approx(statistics.median(figures["tok_s_rounds"]))
            assert figures["cpu_s_per_token"] > 0
            if result["phase"] == "decode":
                assert figures["tok_s"] == pytest.approx(result["batch"] / figures["step_ms"] * 1e3)
                step_bytes = 2 * PARAMETERS + result["batch"] * (20 + 2 + 1.5) * about["kv_bytes_per_token"]
                assert figures["step_bytes"] == pytest.approx(step_bytes, abs=1)
                gb_s = figures["step_bytes"] / figures["step_ms"] / 1e6
                assert figures["bandwidth_share"] == pytest.approx(gb_s / bandwidth)
        if HAS_TRANSFORMERS:
            pairs = zip(result["maxlike"]["tok_s_rounds"], result["transformers"]["tok_s_rounds"], strict=True)
            assert result["ratio_rounds"] == pytest.approx([ours / theirs for ours, theirs in pairs])
            assert result["ratio"] == statistics.median(result["ratio_rounds"])


def test_table_for_a_config_of_ones_own_on_two_devices(bench: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(bench.PRESETS["tiny"] | {"tie_word_embeddings": False, "num_hidden_layers": 1}))
    done = run("--config", str(config), "--dtype", "float32", "--batch", "2", "--tp", "2", "--use-subgraphs",
               "--compare", "none", *QUICK)
    assert done.returncode == 0, done.stderr
    head, version, titles, *rows, blank = done.stdout.splitlines()
    assert str(config) in head and "float32" in head and "2 of cpu" in head and blank == ""
    assert version.startswith("maxlike ") and titles.split()[:2] == ["tok/s", "maxlike"]
    assert [row.split()[:3] for row in rows] == [["prefill,", "32", "tokens"], ["decode,", "batch", "2"]]
    assert rows[1].endswith("%") and float(rows[0].split()[3]) > 0


def test_an_untied_embedding_is_not_streamed(bench: ModuleType) -> None:
    table, norm = np.zeros((512, 128), np.float32), np.zeros(128, np.float32)
    untied = {"embedding.weight": table, "output.weight": table, "norm.weight": norm}
    total = 4 * (2 * EMBEDDING + 128)
    assert bench._bytes(untied, tied=False) == (total, total - 4 * EMBEDDING)
    tied = {"model.embed_tokens.weight": table, "model.norm.weight": norm}
    assert bench._bytes(tied, tied=True) == (4 * (EMBEDDING + 128),) * 2


def test_transformers_decodes_from_its_cache(bench: ModuleType) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    task = {"config": bench.PRESETS["tiny"], "batch": [3], "context": 20, "steps": 4, "prompt_tokens": 8,
            "threads": 1, "dtype": "float32"}
    worker = bench.Transformers(task)
    shapes, step = [], worker._step

    def spy(tokens: Any, cache: Any) -> Any:
        shapes.append((tuple(tokens.shape), cache.get_seq_length()))
        return step(tokens, cache)

    worker._step = spy
    for _ in range(2):  # the second round begins where the first did
        worker.decode(3)
        assert shapes == [((3, 1), 20 + i) for i in range(bench.WARM_UP_STEPS + 4)]
        shapes.clear()
    worker.prefill()
    assert shapes == [((1, 8), 0)]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "1,0"], "expected an integer of at least 1; got '0'"),
        (["--dtype", "bfloat16,float16"], "got 'float16'"),
        (["--context", "-1"], "--context must be 0 or above; got -1"),
        (["--shape", "gpt-2"], "invalid choice: 'gpt-2'"),
        (["--config", "no/such/file.json"], "no/such/file.json cannot be read"),
    ],
)
def test_bad_arguments(bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str],
                       told: str) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(arguments)
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert told in printed.err and printed.err.count("\n") == 1


def test_a_shape_that_does_not_fit_is_told_in_one_line() -> None:
    done = run("--shape", "tiny", "--tp", "3", "--dtype", "float32", "--compare", "none", *QUICK)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and done.stdout == ""
    assert "Tensor-parallel size 3" in last and "Legal sizes: 1, 2, 4" in last and "Traceback" not in done.stderr


def test_an_engine_that_fails_is_named(bench: ModuleType, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ChildProcessError, match="maxlike ended with code 1"):
        bench.Worker("maxlike", {"no": "task"})
    assert "KeyError" in capfd.readouterr().err  # the worker says why
