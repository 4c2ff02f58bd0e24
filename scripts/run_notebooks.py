"""Runs the notebooks and stores them with what came out: `python scripts/run_notebooks.py [NOTEBOOK.ipynb ...]`.

Without names all of notebooks/ are run. Each runs offline in a folder of its own, which is thrown away. What differs
from run to run and says nothing to a reader is not stored: when and in which order cells ran, what goes to stderr
(warnings, progress). A notebook that names a folder of this machine is refused.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
LONGEST = 180  # seconds that a cell may take
LARGEST = 300_000  # bytes of a stored notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, environment: Mapping[str, str]) -> None:
    """Runs the cells top to bottom in a new kernel whose working directory is `folder`; outputs go into `notebook`.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; it has the traceback.
    """
    errors_only = "--Application.log_level=40"  # of the kernel, which would warn of its local sockets
    client = NotebookClient(notebook, timeout=LONGEST, kernel_name="python3", record_timing=False,
                            extra_arguments=[errors_only], resources={"metadata": {"path": str(folder)}})
    client.execute(env=dict(environment))


def tidy(notebook: nbformat.NotebookNode) -> None:
    """Takes out what differs from run to run, so that a new run of the same code changes what it should and no more."""
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for i, cell in enumerate(notebook.cells):
        cell.id, cell.metadata = f"cell-{i:02d}", {}
        if cell.cell_type != "code":
            continue
        cell.execution_count = None
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = None


def run(file: Path) -> None:
    """Runs a notebook and stores it.

    Raises:
        ValueError: it names a folder of this machine, or has become too large.
    """
    notebook = nbformat.read(file, as_version=4)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
        execute(notebook, Path(folder), environment)
        tidy(notebook)
        text = nbformat.writes(notebook) + "\n"
        for private in (folder, tempfile.gettempdir(), str(ROOT), str(Path.home())):
            if len(private) > 1 and (f"{private}/" in text or f"{private}\\n" in text):
                raise ValueError(f"{file.name} names {private} in its outputs: have it print something else.")
    if len(text) > LARGEST:
        raise ValueError(f"{file.name} would have {len(text)} bytes; at most {LARGEST} are stored: draw less.")
    file.write_text(text, encoding="utf-8")
    print(f"{file.name}: {time.perf_counter() - start:.0f} s, {len(text) // 1000} kB")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all")
    for file in parser.parse_args().notebooks or sorted(NOTEBOOKS.glob("*.ipynb")):
        run(file)


if __name__ == "__main__":
    main()
