"""Your own data: ``_init_dataset`` sets a map-style dataset, here the bytes of one file, cut into rows.

Tinytron shuffles the rows, deals them to the ranks, resumes at any step and, with ``--do_val``, keeps some for validation.
"""

from pathlib import Path

import torch
from torch.utils.data import Dataset

from tinytron.cli import entry, pretrain
from tinytron.training import Config, Trainer


class FileBytes(Dataset[torch.Tensor]):
    """Rows of ``seq_len + 1`` bytes; a row's last byte is the next row's first, so every byte is a target once."""

    def __init__(self, path: Path, seq_len: int) -> None:
        ids = torch.tensor(list(path.read_bytes()))
        self.rows = ids.unfold(0, seq_len + 1, seq_len)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.rows[index]


class MyTrainer(Trainer):
    """Trains on the file that ``--dataset_path`` names, or on this script."""

    def _init_dataset(self, config: Config) -> None:
        self.train_dataset = FileBytes(Path(config.data.dataset_path or __file__), config.train.seq_len)


if __name__ == "__main__":
    entry.run(lambda: pretrain.main(trainer=MyTrainer))
