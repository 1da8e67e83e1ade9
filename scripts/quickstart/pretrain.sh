#!/usr/bin/env bash
# The whole pipeline in one command: text -> tokenizer -> token shards -> a trained GPT -> samples and a loss curve.
#
#   bash scripts/quickstart/pretrain.sh                            the source code of Python's standard library
#   DATA=path/to/text/files bash scripts/quickstart/pretrain.sh    your own text
#
# Extra arguments go to training (--max_steps 500). After an interruption the same command continues. Results are in
# log/quickstart/.
set -euo pipefail
source "$(dirname "$0")/../lib/launch.sh"
need_python quickstart torch numpy tqdm tokenizers matplotlib
workers=1 # the largest power of two, so that it divides the batch
while [ $((2 * workers)) -le "$((NUM_GPUS > 0 ? NUM_GPUS : NPROC))" ]; do workers=$((2 * workers)); done
if [ "$NUM_GPUS" -gt 0 ]; then NUM_GPUS=$workers; else NPROC=$workers; fi
flags="$("$PYTHON" scripts/quickstart/prepare.py --workers "$workers" ${DATA:+--data "$DATA"})"
eval "flags=($flags)" # quoted by prepare.py
flags=(--log_dir log/quickstart "${flags[@]}" "$@")
(launch pretrain_debug.py "${flags[@]}")
"$PYTHON" scripts/quickstart/report.py "${flags[@]}"
