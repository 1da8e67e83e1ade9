#!/usr/bin/env bash
# 1.5B dense GPT on token shards (folder with train_*.bin and val_*.bin), 1,048,576 tokens per step:
#
#   DATASET_PATH=path/to/shards bash scripts/gpt_1b/pretrain.sh [--max_steps 100000 ...]
#   bash scripts/gpt_1b/pretrain.sh --dry_run --dry_run_world_size 8 --backend nccl     what it needs on 8 GPUs
#
# The environment variables are listed in scripts/lib/launch.sh.
set -euo pipefail
: "${BATCH_SIZE:=2}" "${GBS:=256}" "${LR_WARMUP_STEPS:=2000}" "${DEBUG:=0}" "${DETER_MODE:=0}"
: "${DATASET_PATH:=../data/fineweb-edu-sample-10BT/}"
source "$(dirname "$0")/../lib/launch.sh"
need_python "" torch numpy tqdm
launch pretrain_debug.py --exp_name gpt_1b --do_val \
    --preset 1b "${COMMON[@]}" "$@"
