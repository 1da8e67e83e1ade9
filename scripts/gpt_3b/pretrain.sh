#!/usr/bin/env bash
# 3B dense GPT on token shards (folder with train_*.bin and val_*.bin), 2,097,152 tokens per step:
#
#   DATASET_PATH=path/to/shards bash scripts/gpt_3b/pretrain.sh [--max_steps 100000 ...]
#
# The environment variables are listed in scripts/lib/launch.sh.
set -euo pipefail
: "${BATCH_SIZE:=1}" "${GBS:=512}" "${LR_WARMUP_STEPS:=2000}" "${DEBUG:=0}" "${DETER_MODE:=0}"
: "${DATASET_PATH:=../data/fineweb-edu-sample-10BT/}"
source "$(dirname "$0")/../lib/launch.sh"
need_python "" torch numpy tqdm
launch pretrain_debug.py --exp_name gpt_3b --do_val \
    --preset 3b "${COMMON[@]}" "$@"
