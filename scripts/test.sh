#!/usr/bin/env bash
# Install if needed, then lint, type-check and test. With --compat the compact suite alone.
#   scripts/test.sh [--lane newest|lowest] [--compat] [arguments of pytest ...]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [[ ${1:-} == --lane ]]; then
  export VTPRUNE_LANE=${2:?--lane: expected newest or lowest}
  shift 2
fi
source scripts/lane.sh
scripts/setup.sh

bin=$VTPRUNE_VENV/bin
if [[ ${1:-} == --compat ]]; then
  shift
  set -- -m "compat and not slow" "$@"
else
  "$bin/ruff" check --quiet
  "$bin/ruff" format --check --quiet
  "$bin/mypy"
fi
# Two workers of one thread: most of the time goes to tracing, which uses no more.
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile "$@"
