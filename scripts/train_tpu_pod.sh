#!/usr/bin/env bash
# Trains on all hosts of a TPU slice, from a machine that has gcloud:
#   TPU=my-v5e-16 ZONE=us-west4-a bash scripts/train_tpu_pod.sh CONFIG.yaml [flags of `maxlike train`]
#
# Each host gets this repository (what is committed of it) and the configuration, makes its .venv, and runs the same
# command; JAX finds the other hosts by itself. Output folder and data must be the same for all: a bucket mounted with
# gcsfuse, or NFS.
# To stop, interrupt this script; run again, it goes on from the newest checkpoint.
set -euo pipefail
: "${TPU:?name the TPU, TPU=...}" "${ZONE:?and its zone, ZONE=...}"
[ $# -ge 1 ] || { echo "usage: TPU=... ZONE=... bash $0 CONFIG.yaml [flags]" >&2; exit 2; }
command -v gcloud >/dev/null || { echo "gcloud is missing: install the Google Cloud CLI, then gcloud auth login" >&2; exit 2; }
config=$1; shift
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

on_all_hosts() { gcloud compute tpus tpu-vm ssh "$TPU" --zone "$ZONE" --worker=all --command "$1"; }

archive=$(mktemp --suffix .tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format tar.gz --output "$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU":maxlike.tar.gz --zone "$ZONE" --worker=all
gcloud compute tpus tpu-vm scp "$config" "$TPU":maxlike-run.yaml --zone "$ZONE" --worker=all
on_all_hosts 'mkdir -p maxlike && tar -xzf maxlike.tar.gz -C maxlike && cd maxlike &&
  source scripts/_environment.sh && prepare_environment'
# Quoted for the remote shell, so that flags arrive as they were given.
flags=$([ $# -eq 0 ] || printf ' %q' "$@")
# The platform is stated, so that a TPU which cannot be used is an error and not a slow run on the CPU.
on_all_hosts "cd maxlike && exec env JAX_PLATFORMS=tpu,cpu .venv/bin/python -m maxlike train ../maxlike-run.yaml --distributed$flags"
