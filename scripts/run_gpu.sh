#!/usr/bin/env bash
# Runs maxlike on this machine's NVIDIA GPUs:
#   bash scripts/run_gpu.sh                                     continues a prompt with the embedded model
#   bash scripts/run_gpu.sh serve Qwen/Qwen3-0.6B --port 8000   any command of maxlike and its options
#   bash scripts/run_gpu.sh scripts/profile_step.py decode      any Python script
#
# The first time, it makes .venv with the JAX that the driver can run (CUDA 13, or 12 for drivers before 580). Where
# there is no GPU, or JAX does not see it, it says so and ends.
set -euo pipefail
# shellcheck source=scripts/_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_accelerator gpu
run_on_accelerator "$@"
