"""Pre-train a GPT on token shards, or on mock data when no --dataset_path is given: ``tinytron pretrain`` as a script.

python pretrain_debug.py --num_layer 4 ...            one process, CPU or GPU
torchrun --nproc_per_node=8 pretrain_debug.py ...     one node
"""

from tinytron.cli import entry, pretrain

if __name__ == "__main__":
    entry.run(pretrain.main)
