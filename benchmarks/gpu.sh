#!/usr/bin/env bash
# A GPU's first ten minutes: is this installation right, and how fast is it?
#
#   bash benchmarks/gpu.sh [--minutes 8] [--out FOLDER]     on a machine with a GPU; call it again to continue
#   bash benchmarks/gpu.sh --rehearse                       the same parts at toy sizes on a CPU, in about a minute
#
# Installs nothing: it takes the active Python, or that of .venv, if it has torch >= 2.11, numpy and tqdm.
set -euo pipefail
export CALLED_FROM="$PWD" # --out is relative to it
source "$(dirname "$0")/../scripts/lib/env.sh"
if ! find_python torch numpy tqdm; then
    echo "error: no Python with torch >= 2.11, numpy and tqdm here; activate one, or run bash scripts/quickstart/pretrain.sh once" >&2
    exit 2
fi
export PYTHONPATH="$PYTHONPATH:$ROOT/benchmarks" # last: other packages have names such as kernels, too
exec "$PYTHON" -m gpu.run "$@"
