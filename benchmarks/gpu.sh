#!/usr/bin/env bash
# A GPU's first ten minutes: is this installation right, and how fast is it?
#
#   bash benchmarks/gpu.sh [--minutes 8] [--out FOLDER]     on a machine with a GPU; call it again to continue
#   bash benchmarks/gpu.sh --rehearse                       the same parts at toy sizes on a CPU, in about a minute
#
# Installs nothing: it takes the active Python, or that of .venv, if it has torch >= 2.11 and numpy.
set -euo pipefail
source "$(dirname "$0")/../scripts/lib/env.sh"
if ! find_python torch numpy; then
    echo "error: no Python with torch >= 2.11 and numpy here; activate one, or run bash scripts/quickstart/pretrain.sh once" >&2
    exit 2
fi
export PYTHONPATH="$ROOT/benchmarks:$PYTHONPATH"
exec "$PYTHON" -m gpu.run "$@"
