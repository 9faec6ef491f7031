#!/usr/bin/env bash
# Install the checkout and everything it needs, in the versions of a lane: $VTPRUNE_LANE,
# newest or lowest. Into .venv or .venv-lowest, or into $VTPRUNE_VENV.
# Running it again does nothing until pyproject.toml or the lane's constraints change.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lane.sh

constraints=constraints/$VTPRUNE_LANE.txt
python=$VTPRUNE_VENV/bin/python
stamp=$VTPRUNE_VENV/vtprune-setup.stamp
wanted=$(echo "$PWD" && cat pyproject.toml "$constraints" scripts/setup.sh)

if [[ -x $python && -f $stamp && $(<"$stamp") == "$wanted" ]]; then
  exit 0
fi
if [[ ! -x $python ]]; then
  python3 -m venv "$VTPRUNE_VENV"
fi
echo "Installing lane $VTPRUNE_LANE into $VTPRUNE_VENV (a few minutes the first time)" >&2
# torch first and exactly: the CPU build is published under this one version, and a
# range would let pip prefer a newer build that brings all of CUDA.
"$python" -m pip install -qq --disable-pip-version-check -c "$constraints" torch
"$python" -m pip install -qq --disable-pip-version-check \
  -c "$constraints" -e ".[onnxruntime,tensorrt-rtx,demo,dev,docs]"
# For its schema of Triton's model configurations alone: its client wants an older protobuf.
"$python" -m pip install -qq --disable-pip-version-check --no-deps tritonclient==2.73.0
printf '%s' "$wanted" >"$stamp"
