#!/usr/bin/env bash
# Install if needed, then run the demonstration. Arguments go to `vtprune demo`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/lane.sh
scripts/setup.sh
exec "$VTPRUNE_VENV/bin/vtprune" demo "$@"
