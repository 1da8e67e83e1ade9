#!/usr/bin/env bash
# 0.25B dense GPT, on mock data unless DATASET_PATH is given; no checkpoints unless DEBUG=0:
#
#   bash scripts/debug_gpt_0.25b/pretrain.sh [--max_steps 5 ...]
#   NUM_GPUS=0 NPROC=2 BATCH_SIZE=1 SEQ_LEN=128 GBS=4 bash scripts/debug_gpt_0.25b/pretrain.sh --num_layer 2 --max_steps 3
#
# The environment variables are listed in scripts/lib/launch.sh.
set -euo pipefail
source "$(dirname "$0")/../lib/launch.sh"
need_python "" torch numpy tqdm
launch pretrain_debug.py --exp_name debug_gpt_0.25b --mock_data_num_samples "$((20 * GBS))" \
    --preset 0.25b "${COMMON[@]}" "$@"
