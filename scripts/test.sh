#!/usr/bin/env bash
# Runs the tests:  bash scripts/test.sh [pytest arguments]
# Without arguments, all but the slow ones, on all cores; `-m ""` runs everything. The first time, it makes .venv and
# installs into it.
set -euo pipefail
# shellcheck source=scripts/_environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
prepare_environment test
cd "$root"
[ $# -gt 0 ] || set -- -n auto
exec "$python" -m pytest "$@"
