#!/usr/bin/env bash
# From the quickstart's model to one that answers questions, in minutes on two cores: dialogues about the corpus -> fine-tuning
# -> preferences (DPO) -> an export that transformers opens.
#
#   bash scripts/chat_small/train.sh                   starts with the quickstart, if that was not run yet
#   MODEL=log/my_run bash scripts/chat_small/train.sh  another model with the tokenizer of its data
#
# After an interruption the same command continues. Results are in log/chat_small/.
set -euo pipefail
source "$(dirname "$0")/../lib/launch.sh"
need_python quickstart torch numpy tqdm tokenizers matplotlib omegaconf transformers

newest() { # PATTERN: the newest folder that matches
    # shellcheck disable=SC2012,SC2086  # names that our own runs made
    ls -td $1 2>/dev/null | head -n 1
}
tinytron() { "$PYTHON" -m tinytron "$@"; }
model="${MODEL:-$(newest 'log/quickstart/quickstart_*')}"
if [ -z "$model" ] || ! ls "$model"/*_meta.pt >/dev/null 2>&1; then
    bash scripts/quickstart/pretrain.sh
    model="$(newest 'log/quickstart/quickstart_*')"
fi
data=data/chat_small
log=log/chat_small
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(nproc)}"
tokenizer="$("$PYTHON" scripts/chat_small/tokenizer_of.py "$model")"

"$PYTHON" scripts/chat_small/dialogues.py --out "$data"
tinytron tokenize --dataset_path "$data/dialogues.jsonl" --messages_key messages --assistant_only \
    --tokenizer_path "$tokenizer" --val_fraction 0.05 --output_dir "$data/sft"
tinytron tokenize --dataset_path "$data/pairs.jsonl" --prompt_key prompt --chosen_key chosen --rejected_key rejected \
    --tokenizer_path "$tokenizer" --block_size 128 --val_fraction 0.1 --output_dir "$data/preferences"

# Fine-tuning: whole dialogues are packed into sequences, and only the assistant's tokens count.
flags=(--precision fp32 --seq_len 256 --batch_size 8 --warmup_steps 10 --log_every 20)
tinytron pretrain --exp_name tuned --log_dir "$log" --init_from "$model" --dataset_path "$data/sft" \
    --packing best_fit --document_mask --total_batch_sequences 8 --max_epochs 8 --max_lr 2e-3 --min_lr 1e-4 \
    --do_val --val_every_steps 100 "${flags[@]}"
tuned="$(newest "$log/tuned_*")"

# Preferences: the right answer to a question rather than that to another one.
tinytron configure backbone/train/contrastive "$log/dpo.yaml" architecture.backbone.weights="$tuned" \
    data.dataset_path="$data/preferences" train.precision=fp32 architecture.block_size=256 train.batch_size=4 \
    train.total_batch_sequences=16 train.max_epochs=2 train.do_val=true optim.max_lr=1e-4 optim.min_lr=1e-5 \
    optim.warmup_steps=5 logging.log_every=10 optimization.dpo.beta=0.1
tinytron run preferred "$log/dpo.yaml" "$log"
preferred="$(newest "$log/checkpoints/general/default/preferred/preferred_*")"

rm -rf "$log/export"
tinytron export --checkpoint "$preferred" --out "$log/export" --tokenizer "$tokenizer"
"$PYTHON" scripts/chat_small/compare.py --checkpoint "$preferred" --export "$log/export"
echo "next: tinytron generate --checkpoint $preferred --chat --temperature 0"
