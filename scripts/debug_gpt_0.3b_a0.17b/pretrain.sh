#!/usr/bin/env bash
# 0.3B mixture-of-experts GPT with 0.17B active parameters, on mock data unless DATASET_PATH is given:
#
#   bash scripts/debug_gpt_0.3b_a0.17b/pretrain.sh [--max_steps 5 ...]
#
# The environment variables are listed in scripts/lib/launch.sh.
set -euo pipefail
source "$(dirname "$0")/../lib/launch.sh"
need_python "" torch numpy tqdm
launch pretrain_debug.py --exp_name debug_gpt_0.3b_a0.17b --mock_data_num_samples "$((20 * GBS))" \
    --preset 0.3b-a0.17b "${COMMON[@]}" "$@"
