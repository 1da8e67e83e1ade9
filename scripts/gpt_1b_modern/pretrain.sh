#!/usr/bin/env bash
# 1.5B dense GPT, about the size of gpt_1b, in proportions that suit GPUs: heads of 128 (the size at which attention kernels
# are fastest), one key/value head for four query heads (a fourth of the cache when generating), normalized queries and keys
# (so that scores cannot grow), a narrower feed-forward layer and more blocks. The head is tied: an untied one would add 7 %
# to parameters, gradients and states. Trains on token shards, with 1,048,576 tokens per step:
#
#   DATASET_PATH=path/to/shards bash scripts/gpt_1b_modern/pretrain.sh [--max_steps 100000 ...]
#   bash scripts/gpt_1b_modern/pretrain.sh --dry_run --dry_run_world_size 8 --backend nccl     what it needs on 8 GPUs
#
# The environment variables are listed in scripts/lib/launch.sh.
set -euo pipefail
: "${BATCH_SIZE:=2}" "${GBS:=256}" "${LR_WARMUP_STEPS:=2000}" "${DEBUG:=0}" "${DETER_MODE:=0}"
: "${DATASET_PATH:=../data/fineweb-edu-sample-10BT/}"
source "$(dirname "$0")/../lib/launch.sh"
need_python "" torch numpy tqdm
launch pretrain_debug.py --exp_name gpt_1b_modern --do_val \
    --preset 1b-modern "${COMMON[@]}" "$@"
