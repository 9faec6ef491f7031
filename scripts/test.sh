#!/usr/bin/env bash
# Install if needed, then lint, type-check and test. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scripts/setup.sh
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV

bin=${VTPRUNE_VENV:-.venv}/bin
"$bin/ruff" check --quiet
"$bin/ruff" format --check --quiet
"$bin/mypy"
# Two workers of one thread: most of the time goes to tracing, which uses no more.
OMP_NUM_THREADS=1 "$bin/python" -m pytest -n 2 --dist loadfile "$@"
