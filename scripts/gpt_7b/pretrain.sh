#!/usr/bin/env bash
# 8B dense GPT on token shards (folder with train_*.bin and val_*.bin), 4,194,304 tokens per step; the backward pass
# recomputes the blocks, to leave room for the weights:
#
#   DATASET_PATH=path/to/shards bash scripts/gpt_7b/pretrain.sh [--max_steps 100000 ...]
#   bash scripts/gpt_7b/pretrain.sh --dry_run --dry_run_world_size 64 --backend nccl     what it needs on 64 GPUs
#
# The environment variables are listed in scripts/lib/launch.sh.
set -euo pipefail
: "${BATCH_SIZE:=2}" "${GBS:=1024}" "${MAX_LR:=3e-4}" "${MIN_LR:=3e-5}" "${LR_WARMUP_STEPS:=2000}" "${DEBUG:=0}" "${DETER_MODE:=0}"
: "${DATASET_PATH:=../data/fineweb-edu-sample-10BT/}"
source "$(dirname "$0")/../lib/launch.sh"
need_python "" torch numpy tqdm
launch pretrain_debug.py --exp_name gpt_7b --do_val --recompute full \
    --preset 7b "${COMMON[@]}" "$@"
