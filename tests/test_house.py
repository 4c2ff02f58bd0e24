"""The house keeps its shape: what may import what, what no file may do, what every public name must have."""

import ast
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "maxlike"

# Imports run downward only: each line knows the lines above it, and itself.
LAYERS = [
    {"mesh"},
    {"kernels"},
    {"nn"},
    {"models"},
    {"engine", "serve", "train", "plan", "bench"},
    {"cli", "__main__", "__init__"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
STRANGERS = {("engine", "train"), ("train", "engine")}
WITHOUT_FLAX = {"mesh", "kernels"}
MAX_LINES = 450


def imported_names(file: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, absolute dotted name) of everything that the file imports, wherever in it the import stands."""
    here = (package.name, *file.relative_to(package).with_suffix("").parts)
    for node in ast.walk(ast.parse(file.read_text(), file)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = [*(here[: -node.level] if node.level else ()), *((node.module or "").split("."))]
            yield from ((node.lineno, ".".join([*filter(None, module), alias.name])) for alias in node.names)


def part_of(name: str, package: Path) -> str:
    """The part a name lies in: `maxlike.nn.linear.Linear` in `nn`, `maxlike.load` in `__init__`."""
    top = name.split(".")[1:2]
    exists = top and ((package / top[0]).is_dir() or (package / f"{top[0]}.py").is_file())
    return top[0] if exists else "__init__"


def misplaced_imports(package: Path) -> list[str]:
    """One line for each import below `package` that the order does not allow."""
    found = []
    for file in sorted(package.rglob("*.py")):
        part = file.relative_to(package).parts[0].removesuffix(".py")
        if part not in LEVEL:
            found.append(f"{file.name}: the order has no place for `{part}`: give it one in LAYERS")
            continue
        for line, name in imported_names(file, package):
            where = f"{file.relative_to(package.parent)}:{line}: "
            if name.split(".")[0] == "flax" and part in WITHOUT_FLAX:
                found.append(f"{where}{part} knows arrays only, and imports {name}")
            if name.split(".")[0] != package.name:
                continue
            target = part_of(name, package)
            if LEVEL.get(target, len(LAYERS)) > LEVEL[part]:
                found.append(f"{where}{part} lies below {target}, and imports {name}")
            if (part, target) in STRANGERS:
                found.append(f"{where}{part} and {target} stand side by side, and it imports {name}")
    return found


def test_imports_run_downward() -> None:
    assert not misplaced_imports(PACKAGE)


@pytest.mark.parametrize(
    ("file", "source", "problem"),
    [
        ("kernels/k.py", "import maxlike.nn", "kernels lies below nn"),
        ("kernels/k.py", "from flax import nnx", "knows arrays only"),
        ("kernels/deep/k.py", "from ...nn.linear import Linear", "kernels lies below nn"),
        ("mesh.py", "def f():\n    from maxlike import kernels", "mesh lies below kernels"),
        ("nn/linear.py", "from maxlike import load", "nn lies below __init__"),
        ("nn/linear.py", "from . import norm\nfrom ..kernels import k\nimport flax.nnx", None),
        ("models/llama.py", "from maxlike.engine import Engine", "models lies below engine"),
        ("engine/runner.py", "from maxlike.train import loss", "stand side by side"),
        ("train/step.py", "from maxlike.engine import batch", "stand side by side"),
        ("serve/app.py", "from maxlike.engine import batch\nfrom maxlike.nn import linear", None),
        ("cli.py", "from .train import loop\nfrom maxlike import load", None),
        ("utils.py", "", "no place for `utils`"),
    ],
)
def test_order_is_seen(tmp_path: Path, file: str, source: str, problem: str | None) -> None:
    package = tmp_path / "maxlike"
    for part in ("kernels", "nn", "models", "engine", "train", "serve"):
        (package / part).mkdir(parents=True)
    (package / file).parent.mkdir(parents=True, exist_ok=True)
    (package / file).write_text(source)
    found = misplaced_imports(package)
    assert [problem in line for line in found] == [True] if problem else not found


def test_importing_does_nothing() -> None:
    program = """
import os, sys
# What these do is theirs.
import flax.nnx, huggingface_hub, jax, jinja2, numpy, optax, orbax.checkpoint, tokenizers, tqdm
before = dict(os.environ)
import maxlike
assert dict(os.environ) == before, "import maxlike changes the environment"
heavy = {"torch", "transformers"} & set(sys.modules)
assert not heavy, f"import maxlike pulls in {heavy}"
jax.config.update("jax_num_cpu_devices", 3)  # raises once a backend is there
assert len(jax.devices("cpu")) == 3
"""
    # No XLA_FLAGS, which would set the device count.
    environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def ruff(*arguments: str, source: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format=concise", *arguments]
    return subprocess.run(command, cwd=ROOT, input=source, capture_output=True, text=True)


def test_ruff() -> None:
    run = ruff()
    assert run.returncode == 0, run.stdout + run.stderr


def test_no_noqa_for_what_the_package_never_does() -> None:
    run = ruff("--ignore-noqa", "--select=TID251,BLE001,E722", "maxlike")
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("source", "rule"),
    [
        ("def f() -> None:\n    import torch\n", "TID251"),
        ("from transformers import AutoConfig\n", "TID251"),
        ("import os\n\nHOME = os.environ['HOME']\n", "TID251"),
        ("from os import getenv\n", "TID251"),
        ("try:\n    X = 1\nexcept Exception:\n    X = 2\n", "BLE001"),
        ("try:\n    X = 1\nexcept:\n    X = 2\n", "E722"),
        ("def f() -> None:\n    return None\n", "D103"),
        ("class C:\n    x = 1\n", "D101"),
        ("X = 1\n", "D100"),
    ],
)
def test_ruff_sees_it(source: str, rule: str) -> None:
    run = ruff("--stdin-filename=maxlike/nn/example.py", "-", source=source)
    assert f" {rule} " in run.stdout, run.stdout + run.stderr


def test_mypy() -> None:
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_files_read_in_one_sitting() -> None:
    lines = {file.relative_to(ROOT): len(file.read_text().splitlines()) for file in PACKAGE.rglob("*.py")}
    long = {str(file): n for file, n in lines.items() if n > MAX_LINES and file.parts[1] != "kernels"}
    assert not long, f"over {MAX_LINES} lines: is there a second noun in it?"


def test_no_drawer_for_odds_and_ends() -> None:
    drawers = {"utils.py", "util.py", "helpers.py", "misc.py"}
    assert not [file for file in ROOT.glob("[!.]*/**/*.py") if file.name in drawers]


def test_tracked_files_name_no_machine() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode != 0:
        pytest.skip("not a git checkout: no list of tracked files")
    pattern = re.compile(r"/(?:work|root|farm|home|Users)/|pythonhosted\.org|pypi\.org|/opt/(?:pypi|wheels)")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        file = ROOT / name
        if not file.is_file() or file.is_relative_to(PACKAGE / "embedded"):  # a vocabulary may hold anything
            continue
        for number, line in enumerate(file.read_text(errors="replace").splitlines(), 1):
            if pattern.search(line):
                found.append(f"{name}:{number}: {line.strip()[:120]}")
    assert not found


def test_wheel_holds_the_embedded_model(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(file.relative_to(ROOT))
        for suffix in ("py", "html", "json", "safetensors", "jinja", "typed")
        for file in PACKAGE.rglob(f"*.{suffix}")
    }
    assert any(name.endswith(".safetensors") for name in expected), "there is no embedded model"
    assert expected <= held, f"not in the wheel: {sorted(expected - held)}"
