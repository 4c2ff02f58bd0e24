# Sourced by run.sh and test.sh: one function, `prepare_environment [EXTRA...]`, makes .venv ready.
#
# It installs the package (editable) with the extras named and the one this machine's accelerator needs, and does
# so again only when pyproject.toml, Python or the extras have changed since: the file $stamp says what is there.
# Afterwards $python is the environment's interpreter and $accelerator is cuda, cuda12, tpu or empty.
# PYTHON=/path/to/python chooses the interpreter, and rebuilds .venv where that is of another version.

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
  extras=$(echo $extras $accelerator)
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
