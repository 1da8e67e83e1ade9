# scripts/*/pretrain.sh source this file. `launch SCRIPT FLAG...` runs SCRIPT through torchrun on this node's GPUs, or in
# CPU processes. Environment variables (with their defaults):
#
#   NUM_NODES=1 NODE_RANK=0 MASTER_ADDR=localhost MASTER_PORT=29500     several nodes: run the script on each
#                              (not on platforms that set PET_NNODES, PET_NODE_RANK, ...: docs/cluster.md)
#   NUM_GPUS=(all)             GPUs to use on this node; 0: CPU processes
#   NPROC=1                    number of CPU processes, when no GPU is used
#   SEP_SIZE=1 BATCH_SIZE=8 SEQ_LEN=4096 GBS=1024     GBS: global batch in sequences
#   MAX_LR=6e-4 MIN_LR=6e-5 LR_WARMUP_STEPS=2 SEED=1337
#   USE_COMPILE=(1 on GPUs, 0 on CPUs) DEBUG=1 DETER_MODE=1     1: on, 0: off
#   DATASET_PATH=(none: mock data)   folder or pattern of token shards

# Nodes of a platform: torchrun reads PET_* itself, unless the user sets NUM_NODES.
PLATFORM_NODES=0
if [ -z "${NUM_NODES:-}" ]; then
    if [ -n "${PET_NNODES:-}${PET_NODE_RANK:-}${PET_MASTER_ADDR:-}${PET_RDZV_ENDPOINT:-}" ]; then
        PLATFORM_NODES=1
        case "${PET_NPROC_PER_NODE:-}" in
            '' | *[!0-9]*) ;; # auto, gpu, cpu: as without a platform
            *) : "${NUM_GPUS:=$PET_NPROC_PER_NODE}" "${NPROC:=$PET_NPROC_PER_NODE}" ;;
        esac
    elif [ "${WORLD_SIZE:-1}" != 1 ] && [ -n "${RANK:-}" ]; then
        echo "error: WORLD_SIZE=$WORLD_SIZE and RANK=$RANK are set, but NUM_NODES is not; if they count nodes, use" \
            "NUM_NODES=\$WORLD_SIZE NODE_RANK=\$RANK, and if they count processes, start python instead of this script" >&2
        exit 2
    fi
fi

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

_count_gpus() {
    command -v nvidia-smi >/dev/null 2>&1 || { echo 0; return; }
    if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then
        echo "$CUDA_VISIBLE_DEVICES" | tr ',' '\n' | grep -c . || true
    else
        nvidia-smi -L 2>/dev/null | grep -c '^GPU' || true
    fi
}

_whole_number() { # NAME VALUE
    case "$2" in
        '' | *[!0-9]*)
            echo "error: environment variable $1='$2' must be a whole number; use $1=$3" >&2
            exit 2
            ;;
    esac
}

: "${NUM_NODES:=1}" "${NODE_RANK:=0}" "${MASTER_ADDR:=localhost}" "${NPROC:=1}" "${NUM_GPUS:=$(_count_gpus)}"
: "${SEP_SIZE:=1}" "${BATCH_SIZE:=8}" "${SEQ_LEN:=4096}" "${GBS:=1024}" "${SEED:=1337}"
: "${MAX_LR:=6e-4}" "${MIN_LR:=6e-5}" "${LR_WARMUP_STEPS:=2}" "${DEBUG:=1}" "${DETER_MODE:=1}"
_whole_number NUM_NODES "$NUM_NODES" 1
_whole_number NODE_RANK "$NODE_RANK" 0
_whole_number NUM_GPUS "$NUM_GPUS" 0
_whole_number NPROC "$NPROC" 1
_whole_number SEP_SIZE "$SEP_SIZE" 1
_whole_number BATCH_SIZE "$BATCH_SIZE" 8
_whole_number SEQ_LEN "$SEQ_LEN" 4096
_whole_number GBS "$GBS" 1024
if [ "$NUM_GPUS" -gt 0 ]; then : "${USE_COMPILE:=1}"; else : "${USE_COMPILE:=0}"; fi

COMMON=(
    --batch_size "$((BATCH_SIZE * SEP_SIZE))" --seq_len "$SEQ_LEN" --total_batch_size "$((GBS * SEQ_LEN))"
    --sep_size "$SEP_SIZE" --seed "$SEED"
    --max_lr "$MAX_LR" --min_lr "$MIN_LR" --warmup_steps "$LR_WARMUP_STEPS"
)
if [ "$USE_COMPILE" = 1 ]; then COMMON+=(--use_compile); fi
if [ "$DEBUG" = 1 ]; then COMMON+=(--debug); fi
if [ "$DETER_MODE" = 1 ]; then COMMON+=(--deterministic); fi
if [ -n "${DATASET_PATH:-}" ]; then COMMON+=(--dataset_path "$DATASET_PATH"); fi

launch() {
    local workers rendezvous
    if [ "$NUM_GPUS" -eq 0 ]; then
        export CUDA_VISIBLE_DEVICES=""
        workers="$NPROC"
    else
        workers="$NUM_GPUS"
    fi
    if [ "$PLATFORM_NODES" = 1 ]; then
        rendezvous=()
    elif [ "$NUM_NODES" -eq 1 ] && [ -z "${MASTER_PORT:-}" ]; then
        rendezvous=(--standalone)
    else
        rendezvous=(--nnodes "$NUM_NODES" --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}")
    fi
    export CUBLAS_WORKSPACE_CONFIG=:4096:8 # deterministic cuBLAS, read when CUDA starts
    exec "$PYTHON" -m tinytron.cli.launch "${rendezvous[@]}" --nproc_per_node "$workers" "$@"
}
