"""The README tells the truth: every ```bash and ```python block in it is run, in a copy of the repository.

A block that cannot be run here has a comment such as `<!-- not run: needs the network -->` on the line before
it; the reasons that count are those in REASONS. The blocks share one copy and run in order, as for a reader.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from maxlike import cli

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
REASONS = re.compile(r"needs (a TPU|a GPU|the network)\b")
FENCE = re.compile(
    r"(?:^<!-- *not run:(?P<reason>.*?)-->[ \t]*\n\s*)?"
    r"^```(?P<language>[^\n]*)\n(?P<code>.*?)^```[ \t]*$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its first line's number, its language, its text, and why it is not run, if so."""

    line: int
    language: str
    code: str
    not_run: str | None


def blocks_of(text: str) -> list[Block]:
    """All fenced blocks of a Markdown text, in order."""
    return [
        Block(
            line=text.count("\n", 0, match.start("code")) + 1,
            language=match["language"].strip(),
            code=match["code"],
            not_run=None if match["reason"] is None else match["reason"].strip(),
        )
        for match in FENCE.finditer(text)
    ]


# Without a README there is nothing to collect, and the first test fails.
BLOCKS = blocks_of(README.read_text()) if README.exists() else []
RUNNABLE = [block for block in BLOCKS if block.language in {"bash", "python"}]


def test_the_readme_shows_how() -> None:
    assert README.exists(), "there is no README.md"
    assert {block.language for block in RUNNABLE if block.not_run is None} == {"bash", "python"}
    unseen = {block.language for block in BLOCKS} & {"sh", "shell", "console", "py", "python3"}
    assert not unseen, "call them bash and python, so that they are run"


def test_reasons_for_not_running_are_good_ones() -> None:
    reasons = {block.line: block.not_run for block in BLOCKS if block.not_run is not None}
    assert not {line: reason for line, reason in reasons.items() if not REASONS.match(reason)}


def test_blocks_are_found() -> None:
    text = """a
```bash
ls
```

<!-- not run: needs a TPU -->
```python
x = 1

y
```
<!-- other -->
```
z
```
"""
    assert blocks_of(text) == [
        Block(3, "bash", "ls\n", None),
        Block(8, "python", "x = 1\n\ny\n", "needs a TPU"),
        Block(14, "", "z\n", None),
    ]
    assert not REASONS.match("") and not REASONS.match("too slow") and REASONS.match("needs a GPU with 80 GB")


def options_of(parser: argparse.ArgumentParser, command: str) -> Iterator[tuple[str, str]]:
    """(command, option) of each option of a command and of those below it; `--no-x` is left to `--x`."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                yield from options_of(below, f"{command} {name}")
        elif action.help != argparse.SUPPRESS:
            yield from ((command, option) for option in action.option_strings[:1])


def test_every_option_is_told() -> None:
    readme = README.read_text()
    options = {(command, option) for command, option in options_of(cli._parser(), "maxlike")
               if option not in ("-h", "--help", "--version")}
    assert ("maxlike serve", "--page-size") in options and len(options) > 100
    untold = {entry for entry in options if not re.search(re.escape(entry[1]) + r"(?![\w-])", readme)}
    assert not untold


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository as it stands, with the environment that runs these tests as its .venv."""
    copy = tmp_path_factory.mktemp("readme") / "maxlike"
    passing = shutil.ignore_patterns(".git", ".venv", ".*_cache", "__pycache__", ".hypothesis")
    shutil.copytree(ROOT, copy, ignore=passing)
    (copy / ".venv").symlink_to(sys.prefix)
    return copy


@pytest.mark.parametrize("block", RUNNABLE, ids=lambda block: f"line{block.line}-{block.language}")
def test_block_runs(block: Block, scratch: Path) -> None:
    if block.not_run is not None:
        pytest.skip(block.not_run)
    if block.language == "python":
        command = [sys.executable, "-c", block.code]
    else:
        if "scripts/" in block.code and not (Path(sys.prefix) / ".maxlike-installed").exists():
            pytest.skip("the scripts would install into this environment: run the suite by scripts/test.sh")
        # The suite does not run itself again; that the command would start it is shown by collecting.
        code = block.code.replace("scripts/test.sh", "scripts/test.sh --collect-only -q")
        command = ["bash", "-euo", "pipefail", "-c", code]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    run = subprocess.run(
        command,
        cwd=scratch,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = f"{run.stdout[-4000:]}\n{run.stderr[-8000:]}"
    assert run.returncode == 0, f"README.md, line {block.line}:\n{block.code}\n{said}"
