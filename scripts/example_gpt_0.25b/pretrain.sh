#!/usr/bin/env bash
# 0.25B dense GPT on a Hugging Face dataset and tokenizer, or on a local folder or jsonl file:
#
#   bash scripts/example_gpt_0.25b/pretrain.sh
#   HF_TOKENIZER=my_tokenizer.json bash scripts/example_gpt_0.25b/pretrain.sh --dataset_path texts.jsonl
#
# HF_DATASET_REPO, HF_DATASET_NAME, HF_SPLIT, HF_TOKENIZER, HF_MAX_SAMPLES, HF_MIN_CHARS, HF_ADD_EOS_TOKEN,
# HF_SHUFFLE_BUFFER and others are described in pretrain_example.py; the rest in scripts/lib/launch.sh.
set -euo pipefail
: "${DEBUG:=0}" "${DETER_MODE:=0}" "${LR_WARMUP_STEPS:=100}" "${GBS:=128}"
source "$(dirname "$0")/../lib/launch.sh"
need_python data torch numpy tqdm datasets transformers
launch pretrain_example.py --exp_name example_gpt_0.25b \
    --preset 0.25b "${COMMON[@]}" "$@"
