#!/usr/bin/env bash
# Runs maxlike on a TPU VM, on the chips of this host:
#   bash scripts/run_tpu.sh                                     continues a prompt with the embedded model
#   bash scripts/run_tpu.sh serve Qwen/Qwen3-0.6B --port 8000   any command of maxlike and its options
#   bash scripts/run_tpu.sh scripts/profile_step.py decode      any Python script
#
# The first time, it makes .venv with JAX for TPU. Where there is no TPU, or JAX does not see it, it says so and ends.
# A TPU belongs to one process at a time. Slices of several hosts train (scripts/train_tpu_pod.sh); to serve, take one
# host's: up to v5e-8, v6e-8.
set -euo pipefail
# shellcheck source=scripts/_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_accelerator tpu
run_on_accelerator "$@"
