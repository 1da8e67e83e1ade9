#!/usr/bin/env bash
# Which layout and micro-batch train fastest? Short runs on mock data over a grid, a table, and the command of the fastest:
#
#   SEP_SIZES="1 2" BATCH_SIZES="4 8 16" bash scripts/autotune.sh --preset 1b --seq_len 8192
#
# The arguments are flags of tinytron pretrain (none: --preset 0.25b). Environment variables (with their defaults):
#
#   SEP_SIZES="1" BATCH_SIZES="8"      values of --sep_size and --batch_size (sequences per data-parallel rank)
#   TARGET_STEPS=20 WARMUP_STEPS=5     measured steps of a run, and steps before them
#   RUN_TIMEOUT=600                    seconds after which a run is ended
#   RESULTS=autotune_results.csv       file for the results
#   SCRIPT=(tinytron pretrain)         a training script of your own
#   NUM_GPUS=(all) NPROC=1             as in scripts/lib/launch.sh
set -euo pipefail
: "${SEP_SIZES:=1}" "${BATCH_SIZES:=8}" "${TARGET_STEPS:=20}" "${WARMUP_STEPS:=5}" "${RUN_TIMEOUT:=600}"
: "${RESULTS:=$PWD/autotune_results.csv}"
source "$(dirname "$0")/lib/env.sh"
need_python "" torch numpy tqdm
[ $# -gt 0 ] || set -- --preset 0.25b
read -ra seps <<< "$SEP_SIZES"
read -ra batches <<< "$BATCH_SIZES"
exec "$PYTHON" -m tinytron autotune --sep_sizes "${seps[@]}" --batch_sizes "${batches[@]}" \
    --target_steps "$TARGET_STEPS" --warmup_steps "$WARMUP_STEPS" --timeout "$RUN_TIMEOUT" --csv "$RESULTS" \
    ${SCRIPT:+--script "$SCRIPT"} -- "$@"
