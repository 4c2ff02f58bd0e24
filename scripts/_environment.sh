# shellcheck shell=bash
# Sourced by the other scripts: `prepare_environment [EXTRA...]` makes .venv ready.
#
# It installs the package (editable) with the extras named and the one this machine's accelerator needs, and does
# so again only when pyproject.toml, Python or the extras have changed since: the file $stamp says what is there.
# Afterwards $python is the environment's interpreter and $accelerator is cuda, cuda12, tpu or empty.
# PYTHON=/path/to/python chooses the interpreter, and rebuilds .venv where that is of another version.
#
# `prepare_accelerator gpu|tpu` does the same, and ends with a message where JAX cannot use one.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
python=$venv/bin/python
stamp=$venv/.maxlike-installed

say() { echo "maxlike: $*" >&2; }
fail() { say "$*"; exit 1; }

version_of() { "$1" -c 'import sys; print("%d.%d.%d" % sys.version_info[:3])' 2>/dev/null; }

# The extra for the accelerator of this machine, found without asking any network.
find_accelerator() {
  local driver node
  if driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null); then
    # JAX's CUDA 13 build needs driver 580; older drivers run the CUDA 12 one.
    if [ "${driver%%.*}" -ge 580 ] 2>/dev/null; then echo cuda; else echo cuda12; fi
    return
  fi
  for node in /dev/accel[0-9]* /dev/vfio/[0-9]*; do
    # Other devices have such nodes too: a TPU is one of a machine with a PCI device made by Google (0x1ae0).
    if [ -e "$node" ] && grep -qs 0x1ae0 /sys/bus/pci/devices/*/vendor; then echo tpu; return; fi
  done
}

# The first Python >= 3.11 that can make a virtual environment.
find_python() {
  local candidate incomplete=""
  if [ -n "${PYTHON:-}" ]; then set -- "$PYTHON"; else set -- python3 python3.13 python3.12 python3.11; fi
  for candidate in "$@"; do
    "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 || continue
    if "$candidate" -c 'import ensurepip, venv' >/dev/null 2>&1; then command -v "$candidate"; return; fi
    incomplete=$candidate
  done
  if [ -n "$incomplete" ]; then
    fail "$incomplete cannot make a virtual environment: on Debian and Ubuntu, 'apt install python3-venv' helps"
  fi
  fail "no Python 3.11 or newer found (looked for: $*): install one, or name it, as in PYTHON=/path/to/python3"
}

# shellcheck disable=SC2120  # most callers need no extra
prepare_environment() {
  local extras="$*" base="" version installed wanted
  accelerator=$(find_accelerator)
  [ -z "${PYTHON:-}" ] || base=$(find_python)

  version=$(version_of "$python") || version=""
  if [ -z "$version" ] || { [ -n "$base" ] && [ "$(version_of "$base")" != "$version" ]; }; then
    [ -n "$base" ] || base=$(find_python)
    version=$(version_of "$base")
    say "making .venv with Python $version"
    "$base" -m venv --clear "$venv" >&2 || fail "$base could not make $venv"
  fi

  # What an earlier command installed stays: run.sh after test.sh has nothing to do.
  installed=$(cat "$stamp" 2>/dev/null) || installed=""
  case " $extras $installed " in *" test "*) extras="test" ;; esac
  extras=${extras:+$extras${accelerator:+ }}$accelerator
  wanted="python $version, pyproject.toml $(cksum <"$root/pyproject.toml"), extras: $extras "
  [ "$installed" != "$wanted" ] || return 0

  rm -f "$stamp"
  local package=".${extras:+[${extras// /,}]}"
  say "installing maxlike${package#.} into .venv; the first time this takes some minutes"
  "$python" -c 'import pip' 2>/dev/null || "$python" -m ensurepip >/dev/null  # a .venv begun but not finished, or uv's
  # -qq: errors only. Some machines' settings make pip warn at length.
  (cd "$root" && "$python" -m pip install -qq --no-input --disable-pip-version-check -e "$package") >&2 ||
    fail "the installation failed; pip says why above. It downloads packages: without a network, connect and run this again"
  echo "$wanted" >"$stamp"
}

# Makes .venv ready for the accelerator $1 (gpu or tpu), and ends unless this machine has one that JAX can use.
prepare_accelerator() {
  local found seen
  found=$(find_accelerator)
  case $1,$found in
    gpu,cuda*) export JAX_PLATFORMS=cuda,cpu ;;
    tpu,tpu) export JAX_PLATFORMS=tpu,cpu ;;
    gpu,tpu) fail "this machine has a TPU and no NVIDIA GPU: use scripts/run_tpu.sh" ;;
    tpu,cuda*) fail "this machine has an NVIDIA GPU and no TPU: use scripts/run_gpu.sh" ;;
    gpu,) fail "there is no NVIDIA GPU here: nvidia-smi does not answer. Install the driver; give a container its" \
      "GPUs (docker run --gpus all); under SLURM ask for some (--gpus 1). scripts/run.sh runs on the CPU" ;;
    tpu,) fail "there is no TPU here: no /dev/accel* or /dev/vfio/* with a PCI device of Google's. On Google Cloud" \
      "make a TPU VM (gcloud compute tpus tpu-vm create) and run this on it. scripts/run.sh runs on the CPU" ;;
    *) fail "prepare_accelerator takes gpu or tpu, not '$1'" ;;
  esac
  prepare_environment

  if seen=$(timeout 300 "$python" -c '
import jax
if jax.default_backend() == "cpu":  # where there are no device files JAX passes over CUDA without a word
    raise SystemExit("JAX finds no device but the CPU")
print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")' 2>&1); then
    say "${seen##*$'\n'}"
  elif [ $? = 124 ]; then
    fail "JAX waited 5 minutes for the accelerator. A slice of several hosts starts only when all of them run the" \
      "same program: scripts/train_tpu_pod.sh does that"
  else
    say "$seen"
    if [ "$1" = gpu ]; then
      fail "JAX does not see the GPU that nvidia-smi sees; why stands above. The driver may be too old for the CUDA" \
        "of $("$python" -m pip list 2>/dev/null | grep -i '^jax-cuda.*plugin' | tr -s ' ' || true), or" \
        "LD_LIBRARY_PATH may name another CUDA"
    fi
    fail "JAX does not see the TPU; why stands above. A TPU belongs to one process: end the one that has it" \
      "(lsof -w /dev/accel* /dev/vfio/* tells which)"
  fi
}

# Runs what the arguments say: a Python script, or a command of maxlike; without any, a prompt is continued.
run_on_accelerator() {
  case ${1:-} in
    "") exec "$python" -m maxlike generate --prompt "def fibonacci(n):" ;;
    *.py) exec "$python" "$@" ;;
    *) exec "$python" -m maxlike "$@" ;;
  esac
}
