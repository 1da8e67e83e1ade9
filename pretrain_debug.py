"""Pre-train a GPT on token shards, or on mock data when no --dataset_path is given.

python pretrain_debug.py --num_layer 4 ...            one process, CPU or GPU
torchrun --nproc_per_node=8 pretrain_debug.py ...     one node
"""

from tinytron.cli import entry
from tinytron.training import Trainer, build_config, parse_args
from tinytron.training.arguments import show_config
from tinytron.training.dry_run import dry_run


def main() -> None:
    """Flags -> configuration -> trainer -> training."""
    config = build_config(parse_args())
    if config.logging.print_config:
        print(show_config(config))
        return
    if config.logging.dry_run:
        dry_run(config)
        return
    Trainer(config).train()


if __name__ == "__main__":
    entry.run(main)
