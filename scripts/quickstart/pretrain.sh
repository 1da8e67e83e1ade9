#!/usr/bin/env bash
# The whole pipeline in one command: text -> tokenizer -> token shards -> a trained GPT -> samples and a loss curve.
#
#   bash scripts/quickstart/pretrain.sh                            the source code of Python's standard library
#   DATA=path/to/text/files bash scripts/quickstart/pretrain.sh    your own text
#
# This is `tinytron quickstart`, in a .venv that is made if need be. Extra arguments go to training (--max_steps 500). After an
# interruption the same command continues. Results are in log/quickstart/.
set -euo pipefail
source "$(dirname "$0")/../lib/launch.sh"
need_python quickstart torch numpy tqdm tokenizers matplotlib
export NUM_GPUS NPROC
exec "$PYTHON" -m tinytron quickstart ${DATA:+--data "$DATA"} "$@"
