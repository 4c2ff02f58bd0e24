"""The shell scripts: what they install, what they run, and what they say where there is no accelerator.

They run in a copy of the repository's scripts. Its Python is a stand-in that notes what it is asked to do and leaves
the rest to this one; nvidia-smi, srun and gcloud are stand-ins too.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.sh"), *(ROOT / "scripts").glob("*.sbatch"), ROOT / ".ci" / "run"])
Run = Callable[..., subprocess.CompletedProcess[str]]

PYTHON = f"""#!/usr/bin/env bash
case "$*" in
  "-m pip install"*) echo "installs ${{@: -1}}" >>"$NOTES" ;;
  "-m maxlike"*|*.py*) echo "runs $* on $JAX_PLATFORMS" >>"$NOTES" ;;
  *device_count*) if [ -n "${{SEES:-}}" ]; then echo "$SEES"; else exec {sys.executable} "$@"; fi ;;
  *) exec {sys.executable} "$@" ;;
esac
"""
NVIDIA_SMI = '#!/usr/bin/env bash\n[ -n "${DRIVER:-}" ] && echo "$DRIVER" || exit 9\n'
NOTING = """#!/usr/bin/env bash
{ printf "%s" "$(basename "$0")"; printf " [%s]" "$@"; echo; } >>"$NOTES"
"""


@pytest.fixture
def notes(tmp_path: Path) -> Path:
    return tmp_path / "notes"


@pytest.fixture
def run(tmp_path: Path, notes: Path) -> Run:
    """Runs a script in the copy, with variables: DRIVER is the GPU's, SEES what JAX says that it sees."""
    copy, tools = tmp_path / "maxlike", tmp_path / "tools"
    shutil.copytree(ROOT / "scripts", copy / "scripts")
    shutil.copy(ROOT / "pyproject.toml", copy)
    for file, text in {copy / ".venv/bin/python": PYTHON, tools / "nvidia-smi": NVIDIA_SMI, tools / "srun": NOTING,
                       tools / "gcloud": NOTING}.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def run(*command: str, cwd: Path = copy, **variables: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "NOTES": str(notes),
                                    "CUDA_VISIBLE_DEVICES": ""} | variables
        environment.pop("PYTHON", None)
        return subprocess.run(["bash", *command], cwd=cwd, env=environment, capture_output=True, text=True)

    return run


def test_scripts_parse_and_pass_shellcheck() -> None:
    for script in SCRIPTS:
        done = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([shellcheck, "--external-sources", "--severity=warning", *SCRIPTS], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(Path("/dev/accel0").exists() or Path("/dev/vfio/0").exists(), reason="there may be a TPU here")
def test_where_there_is_no_accelerator_they_say_so_and_do_nothing(run: Run, notes: Path) -> None:
    for script, says in (("run_tpu.sh", "there is no TPU here"), ("run_gpu.sh", "there is no NVIDIA GPU here")):
        done = run(f"scripts/{script}", "serve")
        assert done.returncode == 1 and says in done.stderr and "scripts/run.sh" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert not notes.exists()


@pytest.mark.parametrize(("driver", "extra"), [("580.65", "cuda"), ("535.104", "cuda12")])
def test_a_gpu_that_jax_sees(run: Run, notes: Path, driver: str, extra: str) -> None:
    for arguments, runs in (
        ([], "-m maxlike generate --prompt def fibonacci(n):"),
        (["serve", "Qwen/Qwen3-0.6B", "--port", "1"], "-m maxlike serve Qwen/Qwen3-0.6B --port 1"),
        (["scripts/profile_step.py", "decode"], "scripts/profile_step.py decode"),
    ):
        done = run("scripts/run_gpu.sh", *arguments, DRIVER=driver, SEES="some warning\n8 x NVIDIA H200, jax 0.12.0")
        assert done.returncode == 0, done.stderr
        assert done.stderr.splitlines()[-1] == "maxlike: 8 x NVIDIA H200, jax 0.12.0"
        assert notes.read_text().splitlines()[-1] == f"runs {runs} on cuda,cpu"
    assert notes.read_text().count("installs") == 1 and f"installs .[{extra}]\n" in notes.read_text()


def test_a_gpu_that_jax_does_not_see_ends_with_its_reason(run: Run, notes: Path) -> None:
    done = run("scripts/run_gpu.sh", DRIVER="580.65")  # this machine's JAX, which may have no CUDA, and sees no GPU
    assert done.returncode == 1 and "JAX does not see the GPU that nvidia-smi sees" in done.stderr
    assert "no device but the CPU" in done.stderr and "runs" not in notes.read_text()


def test_each_names_the_other(run: Run) -> None:
    done = run("scripts/run_tpu.sh", DRIVER="580.65")
    assert done.returncode == 1 and "use scripts/run_gpu.sh" in done.stderr


def test_slurm(run: Run, notes: Path, tmp_path: Path) -> None:
    variables = dict(DRIVER="580.65", SEES="8 x NVIDIA H200, jax 0.12.0", SLURM_CPUS_PER_TASK="32")
    done = run("scripts/train_slurm.sbatch", "run.yaml", "--output", "a b", **variables)
    assert done.returncode == 0, done.stderr
    python = tmp_path / "maxlike/.venv/bin/python"
    assert notes.read_text().splitlines()[-1] == (
        f"srun [--kill-on-bad-exit=1] [--cpus-per-task=32] [{python}] [-m] [maxlike] [train] [run.yaml] [--output] "
        "[a b] [--distributed]")
    elsewhere = run(str(tmp_path / "maxlike/scripts/train_slurm.sbatch"), "run.yaml", cwd=tmp_path, **variables)
    assert elsewhere.returncode == 2 and "from the folder of the repository" in elsewhere.stderr
    assert run("scripts/train_slurm.sbatch").returncode == 2


def test_tpu_pod(run: Run, notes: Path, tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path / "maxlike"), "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "scripts"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    done = run("scripts/train_tpu_pod.sh", "run.yaml", "--output", "a b", TPU="pod", ZONE="here")
    assert done.returncode == 0, done.stderr
    copied, configured, *_, last = notes.read_text().replace("&&\n", "&& ").splitlines()
    assert "[pod:maxlike.tar.gz] [--zone] [here] [--worker=all]" in copied
    assert "[run.yaml] [pod:maxlike-run.yaml]" in configured
    assert r"JAX_PLATFORMS=tpu,cpu .venv/bin/python -m maxlike train ../maxlike-run.yaml --distributed" in last
    assert r"--output a\ b]" in last
    assert "name the TPU" in run("scripts/train_tpu_pod.sh", "run.yaml").stderr
