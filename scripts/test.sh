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
"$bin/python" -m pytest "$@"
