#!/usr/bin/env bash
# Install if needed, then run the demonstration. Arguments go to `vtprune demo`.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
cd "$root"
exec "${VTPRUNE_VENV:-.venv}/bin/vtprune" demo "$@"
