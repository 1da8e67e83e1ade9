#!/usr/bin/env bash
# nanoGPT's character-level Shakespeare on a CPU, as in its README, and a modern model of the same size for comparison:
#
#   bash scripts/shakespeare_char/pretrain.sh                      downloads the text (1.1 MB)
#   DATA=path/to/input.txt bash scripts/shakespeare_char/pretrain.sh
#
# Trains three models for 2,000 steps each, one after the other, and prints a table. Extra arguments go to all runs
# (--max_steps 500). After an interruption the same command continues. Results are in log/shakespeare_char/.
set -euo pipefail
source "$(dirname "$0")/../lib/env.sh"
need_python quickstart torch numpy tqdm tokenizers
exec "$PYTHON" scripts/shakespeare_char/compare.py ${DATA:+--data "$DATA"} -- "$@"
