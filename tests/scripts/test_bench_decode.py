"""The benchmark on a toy shape: its figures fit together, the engines do the same work, errors take one line."""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_decode.py"
QUICK = ["--rounds", "3", "--steps", "3", "--prompt-tokens", "32", "--context", "20"]
HAS_TRANSFORMERS = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
HAS_LLAMA_CPP = all(importlib.util.find_spec(name) for name in ("llama_cpp", "gguf"))
ENGINES = ["maxlike"] + ["transformers"] * HAS_TRANSFORMERS + ["llama.cpp BF16", "llama.cpp F16"] * HAS_LLAMA_CPP
needs_llama_cpp = pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python or gguf is not installed")

# Of the tiny preset, by hand: embedding; two layers of q, k, v, o, of gate, up, down, and of two norms; final norm.
EMBEDDING = 512 * 128
NORMS = 2 * 2 * 128 + 128
PARAMETERS = EMBEDDING + 2 * (2 * 128 * 128 + 2 * 64 * 128 + 3 * 256 * 128) + NORMS


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        import bench_decode

        yield bench_decode
    finally:
        sys.path.remove(str(SCRIPT.parent))


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
    assert list(of_dtype["engines"]) == ENGINES


def test_engines_hold_the_same_model(report: dict[str, Any]) -> None:
    for engine, about in report["runs"][0]["engines"].items():
        assert about["weight_bytes"] == about["streamed_bytes"]  # tied: the embedding is the head
        assert about["weight_bytes"] == weight_bytes(engine)
        # On CPU our cache is float32; transformers' is in the model's dtype, and llama.cpp's in float16.
        assert about["kv_bytes_per_token"] == 2 * 2 * 4 * 16 * (4 if engine == "maxlike" else 2)


def weight_bytes(engine: str) -> int:
    return 2 * PARAMETERS + (2 * NORMS if engine.startswith("llama.cpp") else 0)  # whose norms are float32


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
                step_bytes = weight_bytes(engine) + result["batch"] * (20 + 2 + 1.5) * about["kv_bytes_per_token"]
                assert figures["step_bytes"] == pytest.approx(step_bytes, abs=1)
                gb_s = figures["step_bytes"] / figures["step_ms"] / 1e6
                assert figures["bandwidth_share"] == pytest.approx(gb_s / bandwidth)
        assert "ratio" not in result["maxlike"]
        for engine in ENGINES[1:]:
            pairs = zip(result["maxlike"]["tok_s_rounds"], result[engine]["tok_s_rounds"], strict=True)
            assert result[engine]["ratio_rounds"] == pytest.approx([ours / theirs for ours, theirs in pairs])
            assert result[engine]["ratio"] == statistics.median(result[engine]["ratio_rounds"])


def test_table_for_a_config_of_ones_own_on_two_devices(bench: ModuleType, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(bench.PRESETS["tiny"] | {"tie_word_embeddings": False, "num_hidden_layers": 1}))
    done = run("--config", str(config), "--dtype", "float32", "--batch", "2", "--tp", "2", "--use-subgraphs",
               "--compare", "none", *QUICK)
    assert done.returncode == 0, done.stderr
    head, version, titles, *rows, blank = done.stdout.splitlines()
    assert str(config) in head and "float32" in head and "2 of cpu" in head and blank == ""
    assert version.startswith("maxlike ") and titles.split()[0] == "tok/s"
    assert [row.split()[:4] for row in rows] == [["prefill,", "32", "tokens", "maxlike"],
                                                 ["decode,", "batch", "2", "maxlike"]]
    assert rows[1].endswith("%") and float(rows[0].split()[4]) > 0


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


@needs_llama_cpp
def test_llama_cpp_decodes_from_its_cache(bench: ModuleType) -> None:
    task = {"config": bench.PRESETS["tiny"], "batch": [3], "context": 600, "steps": 4, "prompt_tokens": 8,
            "threads": 1, "dtype": "float32"}
    worker = bench.LlamaCpp(task, "F16")
    shapes, step, memory = [], worker.step, worker.lib.llama_get_memory(worker.contexts[3])
    last = worker.lib.llama_memory_seq_pos_max

    def spy(context: Any, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> Any:
        shapes.append((len(tokens), list(positions), list(sequences), len(wanted)))
        logits = step(context, tokens, positions, sequences, wanted)
        assert logits.shape == (len(wanted), 512) and np.isfinite(logits).all()
        return logits

    worker.step = spy
    for _ in range(2):  # the second round begins where the first did
        assert [last(memory, s) for s in range(3)] == [599] * 3
        worker.decode(3)
        assert shapes == [(3, [600 + i] * 3, [0, 1, 2], 3) for i in range(bench.WARM_UP_STEPS + 4)]
        shapes.clear()
    worker.prefill()
    worker.prefill()  # into an empty cache again
    assert shapes == [(8, list(range(8)), [0] * 8, 1)] * 2


@needs_llama_cpp
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_runs_the_same_model(bench: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                       tied: bool) -> None:
    """Its logits are transformers', given transformers' weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import random_gguf

    fields = bench.PRESETS["tiny"] | {"tie_word_embeddings": tied, "rope_theta": 500.0, "rms_norm_eps": 1e-3,
                                      "rope_scaling": bench._LLAMA_3_ROPE | {
                                          "factor": 8.0, "original_max_position_embeddings": 64}}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields)).eval()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.1)
    names = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head",
             "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_output": "self_attn.o_proj",
             **{f"attn_{x}": f"self_attn.{x}_proj" for x in "qkv"},
             **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        *block, part, _ = name.split(".")
        layer = f"model.layers.{block[1]}." if block else ""
        weight = model.state_dict()[f"{layer}{names[part]}.weight"].numpy()
        assert weight.shape == shape
        if part in ("attn_q", "attn_k"):  # a head's rows: i and i + 8 side by side
            weight = weight.reshape(-1, 2, 8, shape[1]).swapaxes(1, 2).reshape(shape)
        return weight

    monkeypatch.setattr(random_gguf, "draw_randomly", lambda: draw)
    task = {"config": fields, "batch": [2], "context": 0, "steps": 300, "prompt_tokens": 8, "threads": 1}
    worker = bench.LlamaCpp(task, "F32")
    assert worker.weights == worker.lib.llama_model_size(worker.model)
    ids = np.random.default_rng(0).integers(512, size=(2, 200))
    with torch.inference_mode():
        expected = model(torch.from_numpy(ids)).logits.numpy()
    got = np.concatenate([worker.step(worker.contexts[2], part, range(start, start + 100), [s] * 100, range(100)).copy()
                          for s in range(2) for start, part in ((0, ids[s, :100]), (100, ids[s, 100:]))])
    # Its cache is float16; what a logit may be off by is measured at their size.
    assert np.abs(got - expected.reshape(got.shape)).max() < 4e-3 * np.abs(expected).max()


@needs_llama_cpp
@pytest.mark.parametrize(("fields", "told"), [
    ({"model_type": "qwen3"}, "norms of queries and keys"),
    ({"attention_bias": True}, "a bias"),
    ({"hidden_act": "gelu"}, "the activation gelu"),
])
def test_llama_cpp_refuses_other_shapes(bench: ModuleType, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=f"llama.cpp cannot be compared: .*{told}"):
        bench.LlamaCpp({"config": bench.PRESETS["tiny"] | fields}, "F32")


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_a_peer_that_cannot_be_had(bench: ModuleType, capfd: pytest.CaptureFixture[str],
                                   monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    """If it was asked for, an error; if not, it is left out, and that is said where it refuses."""
    class Worker:
        about: ClassVar = {"platform": platform, "streamed_bytes": 1, "kv_bytes_per_token": 1}

        def __init__(self, engine: str, task: Any):
            if engine.startswith("llama.cpp"):
                raise ValueError("it refuses")

        def __call__(self, command: str, *arguments: Any) -> Any:
            return 1.0 if command == "bandwidth" else (2.0, 2.0)

        def close(self) -> None:
            pass

    monkeypatch.setattr(bench, "Worker", Worker)
    task = {"batch": [1], "context": 8, "steps": 2, "prompt_tokens": 8, "dtype": "bfloat16"}
    with pytest.raises(ValueError, match="it refuses" if platform == "cpu" else "but maxlike runs on tpu here"):
        bench.measure(task, ["transformers", "llama.cpp"], 1, asked_for=True)
    capfd.readouterr()
    report = bench.measure(task, ["transformers", "llama.cpp"], 1, asked_for=False)
    assert list(report["engines"]) == ["maxlike", "transformers"][:1 + (platform == "cpu")]
    assert capfd.readouterr().err.count("is left out: it refuses") == (2 if platform == "cpu" else 0)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--batch", "1,0"], "expected an integer of at least 1; got '0'"),
        (["--dtype", "bfloat16,float16"], "got 'float16'"),
        (["--compare", "llama.cpp,vllm"], "got 'vllm'"),
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
