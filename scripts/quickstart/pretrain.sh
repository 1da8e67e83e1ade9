#!/usr/bin/env bash
# The whole way in one command: text -> tokenizer -> token shards -> a trained GPT -> samples and a loss curve.
#
#   bash scripts/quickstart/pretrain.sh                            the source code of Python's standard library
#   DATA=path/to/text/files bash scripts/quickstart/pretrain.sh    your own text
#
# Extra arguments go to training (--max_steps 500). Interrupted? The same command continues. Results: log/quickstart/.
set -euo pipefail
: "${DEBUG:=0}"
source "$(dirname "$0")/../lib/launch.sh"
need_python quickstart torch numpy tqdm tokenizers matplotlib
flags="$("$PYTHON" scripts/quickstart/prepare.py ${DATA:+--data "$DATA"})"
eval "words=($flags)" # quoted by prepare.py
(launch pretrain_debug.py --exp_name quickstart --log_dir log/quickstart "${words[@]}" "$@")
"$PYTHON" scripts/quickstart/report.py --log_dir log/quickstart
