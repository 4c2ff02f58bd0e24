"""Every notebook runs top to bottom, offline, in a kernel of its own; what it shows is right, and can be read.

A cell in front notes every picture that is shown, one behind reports the values that the test asks for. What is stored
in the repository is the outcome of such a run: `python scripts/run_notebooks.py`.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
IDS = [file.stem for file in NOTEBOOKS]

NOTE_PICTURES = """
import matplotlib.pyplot

_pictures, _show = [], matplotlib.pyplot.show

def _note(figure):
    axes = [ax for ax in figure.axes if ax.get_visible()]
    return {
        "title": figure.get_suptitle(),
        "axes": [
            {
                "title": ax.get_title(), "x": ax.get_xlabel(), "y": ax.get_ylabel(),
                "x_ticks": len(ax.get_xticks()), "y_ticks": len(ax.get_yticks()),
                "x_of": [axes.index(other) for other in ax.get_shared_x_axes().get_siblings(ax) if other in axes],
                "y_of": [axes.index(other) for other in ax.get_shared_y_axes().get_siblings(ax) if other in axes],
                "colorbar": ax.get_label() == "<colorbar>",
            }
            for ax in axes
        ],
    }

def _show_and_note(*args, **kwargs):
    _pictures.extend(_note(matplotlib.pyplot.figure(number)) for number in matplotlib.pyplot.get_fignums())
    _show(*args, **kwargs)

matplotlib.pyplot.show = _show_and_note
"""
REPORT = """
import json, numpy

def _plain(value):
    if isinstance(value, (numpy.ndarray, numpy.generic)):
        return value.tolist()
    raise TypeError(type(value))

print(json.dumps([_pictures, {{name: eval(name) for name in {names!r}}}], default=_plain))
"""

# What is counted and has no unit; every other axis says after a comma what it is measured in.
COUNTED = {"layer", "layers", "page", "device", "kind", "step of the ring", "step", "steps", "tensor-parallel devices",
           "optimizer step", "instructions", "HLO instructions after optimisation", "sequences running",
           "token of the answer", "token (· is a space, ·4 four, ⏎ a new line)", "probability", "attention weight",
           "relative distance", "slice", "new token, counted from 0", "rank, 1 being the likeliest"}  # fmt: skip


def complaints(picture: dict[str, Any]) -> list[str]:
    """What a reader of the picture would miss: titles, labels of axes, units."""
    found = []
    for i, ax in enumerate(picture["axes"]):
        if not ax["colorbar"] and not ax["title"] and not picture["title"]:
            found.append(f"axes {i} have no title")
        for side in "xy":
            # Axes that are drawn once for several, and have their label there, count for all of them.
            labels = [label for j in ax[f"{side}_of"] if (label := picture["axes"][j][side])]
            if not labels and ax[f"{side}_ticks"]:
                found.append(f"axes {i} have no {side} label")
            found += [f"what is {label!r} measured in?" for label in labels
                      if label not in COUNTED and not re.search(r", \S", label)]
    return found


@pytest.fixture(scope="module")
def run_notebooks() -> ModuleType:
    """The script that runs and stores them."""
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "scripts" / "run_notebooks.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kinds(cell: nbformat.NotebookNode) -> list[str]:
    """What a cell puts out, by kind: text that was printed, whether in one piece or several, and each thing shown."""
    outputs = cell.get("outputs", ())
    printed = ["stdout"] if any(output.get("name") == "stdout" for output in outputs) else []
    return printed + [" ".join(sorted(output.data)) for output in outputs if "data" in output]


def run(run_notebooks: ModuleType, name: str, folder: Path, *names: str, as_users: bool = False) -> dict[str, Any]:
    """Runs a notebook and looks at its pictures; returns the values, at its end, of the expressions `names`.

    `as_users`: with XLA's usual optimisations and without the session's compilation cache.
    """
    (file,) = (file for file in NOTEBOOKS if file.stem == name)
    notebook = nbformat.read(file, as_version=4)
    stored = [kinds(cell) for cell in notebook.cells]
    notebook.cells.insert(0, nbformat.v4.new_code_cell(NOTE_PICTURES))
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT.format(names=list(names))))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for variable in ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR") if as_users else ():
        environment.pop(variable, None)
    run_notebooks.execute(notebook, folder, environment)

    outputs = [output for output in notebook.cells[-1].outputs if output.get("name") == "stdout"]
    pictures, values = json.loads(outputs[-1].text)
    drawn = [output for cell in notebook.cells for output in cell.get("outputs", ())
             if "image/png" in output.get("data", ())]  # fmt: skip
    assert 0 < len(drawn) == len(pictures), "a picture is shown without plt.show()"
    assert not [complaint for picture in pictures for complaint in complaints(picture)]
    made = [kinds(cell) for cell in notebook.cells[1:-1]]
    assert made == stored, "other outputs than those stored: run scripts/run_notebooks.py"
    return values


@pytest.mark.slow
def test_quickstart(run_notebooks: ModuleType, tmp_path: Path) -> None:
    values = run(
        run_notebooks, "01_quickstart", tmp_path, "[output.outputs[0].text for output in greedy]",
        "[completion.text for completion in sampled.outputs]", "date", "llm.tokenizer.decode(chat.prompt_token_ids)",
        "chat.outputs[0].text", "surprise", "score.total", "probability", "completion.token_ids",
        "[[token for token, _ in step] for step in steps]", "completion.cumulative_logprob")  # fmt: skip
    greedy, sampled, date, asked, answer, surprise, total, probability, drawn, ranked, together = values.values()
    assert greedy[1].startswith("        self.")  # what a model of Python should know of __init__
    assert len(set(sampled)) == 3
    assert re.fullmatch(r"20[0-2]\d-(0[1-9]|1[0-2])-[0-2]\d", date)
    assert asked.startswith("# Whether the number is even.\ndef is_even") and asked.endswith("is odd.\ndef is_")
    assert answer and "\n\n" not in answer
    assert sum(surprise) == pytest.approx(-total / 0.6931472, rel=1e-5)
    assert 1 < sum(surprise) / len(surprise) < 4  # far less than the 12 bits of knowing nothing
    assert [step[0] for step in ranked] == drawn  # greedy: the likeliest of each step
    assert all(column == sorted(column, reverse=True) for column in map(list, zip(*probability, strict=True)))
    product = 1.0
    for step in probability[0]:
        product *= step
    assert product == pytest.approx(2.718281828**together, rel=1e-4)


@pytest.mark.slow
def test_build_a_transformer(run_notebooks: ModuleType, tmp_path: Path) -> None:
    values = run(run_notebooks, "02_build_a_transformer", tmp_path, "segments", "scan_difference", "cache_difference",
                 "depths", "scanned", "direct", as_users=True)
    assert values["segments"] == [[0, 6, 2], [12, 1, 2]]
    assert values["scan_difference"] < 1e-5 and values["cache_difference"] < 1e-5
    depths = values["depths"]
    (scan_seconds, scan_sizes), (seconds, sizes) = (
        zip(*values[name], strict=True) for name in ("scanned", "direct"))  # fmt: skip
    assert len(set(scan_sizes)) == 1  # however many layers there are
    slopes = [(b - a) / (n - m) for a, b, m, n in zip(sizes, sizes[1:], depths, depths[1:], strict=False)]
    assert max(slopes) < 1.1 * min(slopes) and min(slopes) > 100  # unrolled, each layer adds its own
    assert sizes[-1] > 20 * scan_sizes[-1] and seconds[-1] > 1.2 * scan_seconds[-1]


@pytest.mark.slow
def test_sharding_tour(run_notebooks: ModuleType, tmp_path: Path) -> None:
    values = run(
        run_notebooks, "03_sharding_tour", tmp_path, "layer_all_reduces", "counts", "bytes_held", "ring_error",
        "np.abs(np.asarray(on_mesh) - x @ w.T).max()", "schedule", "logit_difference", "abs(plain_logits).max()",
        "dict(grouped_mesh.shape)", "[weights[f'layers.0.{n}.weight'].sharding.shard_shape((4, 256, 256)) for n in "
        "('attention.q_proj', 'attention.o_proj')]")  # fmt: skip
    reduces, counts, held, by_hand, on_mesh, schedule, logit_difference, largest, factored, shards = values.values()
    assert reduces == ["f32[8,256]"] * 2
    assert counts == {"plain": {"all-reduce": 2}, "collective matmul": {"collective-permute": 28, "all-gather": 2}}
    norms = held["1"]["norms"]
    totals = {int(n): sum(found.values()) for n, found in held.items()}
    assert norms == 4 * 256 * (2 * 4 + 1)
    assert totals == {n: (totals[1] - norms) // n + norms for n in (1, 2, 4, 8)}
    assert by_hand < 1e-10 and on_mesh < 1e-4
    assert all(sorted(step) == list(range(8)) for step in zip(*schedule, strict=True))  # nobody does another's work
    assert [row[-1] for row in schedule] == list(range(8))
    assert logit_difference < 1e-4 * largest
    assert factored == {"kv": 2, "rep": 4}
    assert shards == [[4, 32, 256], [4, 256, 32]]


@pytest.mark.slow
def test_paged_attention(run_notebooks: ModuleType, tmp_path: Path) -> None:
    values = run(
        run_notebooks, "04_paged_attention", tmp_path, "[grid for _, grid in moments]", "tokens_held", "pages_used",
        "[[told['new'], told['changed'].sum(), told['error'], told['read']] for told in steps]", "slot_bytes",
        "online_error", "{name: history for name, (history, _) in served.items()}", "lengths.sum(0)", "empty",
        "n_steps")  # fmt: skip
    moments, held, used, steps, slot_bytes, online_error, served, lengths, empty, n_steps = values.values()
    # Every token of every sequence lies somewhere, and no two in one place.
    sizes = [{"A": 40, "B": 24, "C": 70}, {"A": 60, "B": 44, "C": 90}, {"A": 60, "D": 60, "C": 90}]
    for grid, expected in zip(moments, sizes, strict=True):
        cells = [cell for page in grid for cell in page]
        assert {name: cells.count(i) for i, name in enumerate("ABCD", 1) if i in cells} == expected
    assert held == 210 and used == 4 + 4 + 6
    for new, written, error, _ in steps:
        assert written == sum(new.values()) and error < 1e-5
    assert steps[-1][3] == (3 + 2 + 5) * 16 * slot_bytes  # each page in use once, of 42, 26 and 71 tokens
    assert online_error < 1e-6
    slots, pages = served.values()
    assert max(running for _, _, running in slots) == 8 and 3 * len(pages) < len(slots)
    for history in (slots, pages):
        assert all(tokens <= taken <= 8192 for tokens, taken, _ in history)
    # Whoever is never preempted runs for a step a token of its output, and some more where its prompt waits for room.
    _, output_tokens = lengths
    assert output_tokens <= sum(running for _, _, running in slots) < 1.05 * output_tokens
    assert empty == sorted(empty) and empty[0] < 5 and empty[-1] > 70
    assert n_steps[1] == len(pages) and n_steps[-1] == len(slots)


@pytest.mark.slow
def test_finetune(run_notebooks: ModuleType, tmp_path: Path) -> None:
    values = run(
        run_notebooks, "05_finetune", tmp_path, "exact_before", "exact_after", "loss_first", "loss_last",
        "summary.validation_loss", "summary.steps", "step", "[item['completion'] for item in held_out]",
        "answers_after", "sum(map(sum, surprise_before))", "sum(map(sum, surprise_after))", as_users=True)  # fmt: skip
    before, after, first, last, validation, steps, exported, right, answers, bits_before, bits_after = values.values()
    assert before == 0 and after >= 0.95
    assert after == sum(a == b for a, b in zip(answers, right, strict=True)) / 40
    assert first > 4 and last < 0.05 and validation < 0.05
    assert steps == exported
    assert bits_after < bits_before / 100
    assert (tmp_path / "tuned" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs the TPU's compiler")
def test_plan_a_tpu(run_notebooks: ModuleType, tmp_path: Path) -> None:
    values = run(
        run_notebooks, "06_plan_a_tpu", tmp_path, "weights_by_hand", "token_by_hand", "too_small.to_json()",
        "fitting.to_json()", "{name: found.to_json() for name, found in arithmetic.items()}", "binding",
        "{name: [[s.tokens, s.memory_s, s.compute_s, s.links_s, s.binds] for s in steps] for name, steps in "
        "(('decode', decodes), ('prefill', prefills))}", "[found.fits for found in trained.values()]")  # fmt: skip
    weights, token, refused, fitting, reckoned, binding, steps, trained = values.values()
    assert weights == pytest.approx(2 * 70.55e9, rel=1e-3) and token == 327_680
    # Four chips are refused by the compiler; what it proposes fits, says the compiler too.
    assert not refused["fits"] and "the compiler refuses" in refused["problem"]
    assert refused["memory"]["weights"] == pytest.approx(weights / 4, rel=1e-3)
    assert refused["memory"]["weights"] > refused["memory"]["limit"]
    assert refused["suggestions"] == ["--topology v6e:2x4"]
    assert fitting["fits"] and fitting["method"] == "compiled" and fitting["topology"] == "v6e:2x4"
    memory, cache = fitting["memory"], fitting["cache"]
    assert memory["weights"] == pytest.approx(weights / 8, rel=1e-3) and cache["bytes_per_token"] == token / 8
    assert memory["cache"] == cache["tokens"] * token / 8
    assert 0.09 < memory["head_room"] / memory["limit"] < 0.11  # nine tenths are used
    decode = next(step for step in fitting["steps"] if step["name"] == "decode")
    reduced = next(c for c in decode["collectives"] if c["kind"] == "all-reduce")
    assert (decode["sequences"], decode["binds"], reduced["count"]) == (64, "memory", 2 * 80 + 1)
    # Arithmetic sees what the compiler sees, and is careful: it leaves no more to the cache.
    alone = reckoned["v6e:2x4"]
    assert alone["method"] == "arithmetic" and alone["memory"]["weights"] == memory["weights"]
    assert 0.9 * memory["cache"] < alone["memory"]["cache"] <= memory["cache"]
    assert not reckoned["v6e:2x2"]["fits"] and reckoned["h200:8"]["fits"]
    assert all(decode == "memory" for decode, _ in binding.values()) and binding["h200:8"][1] == "compute"
    # All weights but the embedding's, and each sequence's context; two operations a weight and token.
    matrices = weights - 2 * 128256 * 8192
    for n, read, computed, _, binds in steps["decode"]:
        assert read == pytest.approx((matrices + n * 1024 * token) / 8 / 1638e9, rel=1e-3)
        assert computed >= n * matrices / 8 / 918e12 and binds == "memory"
    assert [n for n, *_, binds in steps["prefill"] if binds == "compute"] == [1024, 2048, 4096]
    assert {binds for n, *_, binds in steps["prefill"] if n < 1024} == {"memory"}
    assert trained == [True] * 3 + [False, True, True]  # with LoRA, then all weights


@pytest.mark.parametrize("file", NOTEBOOKS, ids=IDS)
def test_what_is_stored(file: Path, run_notebooks: ModuleType) -> None:
    notebook = nbformat.read(file, as_version=4)
    nbformat.validate(notebook)
    as_tidied = nbformat.from_dict(notebook)
    run_notebooks.tidy(as_tidied)
    tidied = nbformat.writes(as_tidied) + "\n"
    assert tidied == file.read_text(encoding="utf-8"), "stored otherwise than scripts/run_notebooks.py would"
    assert len(file.read_bytes()) <= run_notebooks.LARGEST

    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert prose[0].startswith("# ") and notebook.cells[0].cell_type == "markdown"
    assert 'find_spec("maxlike") is None' in code[0] and "%pip install" in code[0]
    first_import = re.search(r"^(import|from) (jax|flax|maxlike)\b", code[1], re.MULTILINE)
    assert first_import and "JAX_PLATFORMS" in code[1][: first_import.start()]
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert any("image/png" in output.get("data", ()) for output in outputs), "stored without its pictures"
    for target in re.findall(r"\]\((?!http)([^)]+)\)", "\n".join(prose)):
        assert (file.parent / target).exists(), f"a link to {target}, which is not there"


def test_the_first_cell_installs_nothing_that_is_there() -> None:
    firsts = {nbformat.read(file, as_version=4).cells[1].source for file in NOTEBOOKS}
    assert len(firsts) == 1, "the notebooks install in different ways"
    body = ast.parse(re.sub(r"^(\s*)%pip .*$", r"\1raise SystemExit(7)", firsts.pop(), flags=re.MULTILINE))
    program = ast.unparse(body)
    environment = {"PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == 0
    without = program.replace("find_spec('maxlike')", "find_spec('maxlike_that_is_nowhere')")
    assert subprocess.run([sys.executable, "-c", without], env=environment, check=False).returncode == 7


AX = {"title": "t", "x": "time, s", "y": "layers", "x_ticks": 3, "y_ticks": 3, "x_of": [0], "y_of": [0],
      "colorbar": False}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"title": ""}, "no title"),
        ({"y": ""}, "no y label"),
        ({"y": "", "y_ticks": 0}, None),
        ({"x": "time"}, "measured in"),
        ({"y": "", "colorbar": True}, "no y label"),
        ({"title": "", "colorbar": True}, None),
    ],
)
def test_a_picture_without_labels_is_seen(change: dict[str, Any], complaint: str | None) -> None:
    found = complaints({"title": "", "axes": [{**AX, **change}]})
    assert [complaint in line for line in found] == [True] if complaint else not found


def test_axes_that_share_their_labels() -> None:
    left, right = AX | {"y_of": [0, 1]}, AX | {"y": "", "x_of": [1], "y_of": [0, 1]}
    assert not complaints({"title": "", "axes": [left, right]})
    assert complaints({"title": "", "axes": [left | {"y": ""}, right]})


def test_a_notebook_that_names_this_machine_is_not_stored(run_notebooks: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "private.ipynb"
    cells = [nbformat.v4.new_code_cell("import os\nprint(os.getcwd())")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), file)
    before = file.read_text()
    with pytest.raises(ValueError, match=r"private\.ipynb names .* in its outputs"):
        run_notebooks.run(file)
    assert file.read_text() == before
