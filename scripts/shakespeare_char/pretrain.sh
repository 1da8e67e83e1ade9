#!/usr/bin/env bash
# nanoGPT's character-level Shakespeare on a CPU, as its README runs it, and next to it a modern model of the same size:
#
#   bash scripts/shakespeare_char/pretrain.sh                      downloads the text (1.1 MB)
#   DATA=path/to/input.txt bash scripts/shakespeare_char/pretrain.sh
#
# Three runs of 2,000 steps one after the other, then a table. Extra arguments go to all of them (--max_steps 500).
# Interrupted? The same command continues. Results: log/shakespeare_char/.
set -euo pipefail
source "$(dirname "$0")/../lib/env.sh"
need_python quickstart torch numpy tqdm tokenizers
exec "$PYTHON" scripts/shakespeare_char/compare.py ${DATA:+--data "$DATA"} -- "$@"
