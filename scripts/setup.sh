#!/usr/bin/env bash
# Install the checkout and everything it needs into .venv, or into $VTPRUNE_VENV.
# Running it again does nothing until pyproject.toml or constraints.txt change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
unset PYTHONHOME PYTHONPATH VIRTUAL_ENV

venv=${VTPRUNE_VENV:-.venv}
python=$venv/bin/python
stamp=$venv/vtprune-setup.stamp
wanted=$(echo "$PWD" && cat pyproject.toml constraints.txt scripts/setup.sh)

if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
if [[ ! -x $python ]]; then
  python3 -m venv "$venv"
fi
echo "Installing into $venv (a few minutes the first time)" >&2
# torch first and exactly: the CPU build is published under this one version, and a
# range would let pip prefer a newer build that brings all of CUDA.
"$python" -m pip install -qq --disable-pip-version-check torch==2.13.0
"$python" -m pip install -qq --disable-pip-version-check \
  -c constraints.txt -e ".[onnxruntime,tensorrt-rtx,demo,dev,docs]"
# For its schema of Triton's model configurations alone: its client wants an older protobuf.
"$python" -m pip install -qq --disable-pip-version-check --no-deps tritonclient==2.73.0
printf '%s' "$wanted" >"$stamp"
