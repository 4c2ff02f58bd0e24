#!/usr/bin/env bash
# Continues a prompt on whatever this machine has:  bash scripts/run.sh ["prompt"] [options of `maxlike generate`]
# The first time, it makes .venv and installs the package there.
set -euo pipefail
# shellcheck source=scripts/_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_environment

# The platform is stated, so that an accelerator which cannot be used is an error and not a slow run on the CPU,
# and so that libtpu, where the test extra brought it, does not look for a TPU that is not there.
case $accelerator in
  cuda*) export JAX_PLATFORMS="${JAX_PLATFORMS-cuda,cpu}" ;;
  tpu) export JAX_PLATFORMS="${JAX_PLATFORMS-tpu,cpu}" ;;
  *) export JAX_PLATFORMS="${JAX_PLATFORMS-cpu}" ;;
esac

if [ $# -eq 0 ]; then
  set -- --prompt "def fibonacci(n):"
elif [ "${1#--}" = "$1" ]; then
  set -- --prompt="$1" "${@:2}"
fi
exec "$python" -m maxlike generate "$@"
