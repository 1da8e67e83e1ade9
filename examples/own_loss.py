"""Your own objective: ``_loss`` computes it with the help of a key that only this dataset has (``batch.extras``), and
``_normalizer`` counts what it is divided by. Here every sequence counts the same, however many targets it has.
"""

import torch

from tinytron.cli import entry, pretrain
from tinytron.data import Batch, MockDataset
from tinytron.model.modules.loss import LossSums
from tinytron.training import Config, Trainer


class Answers(MockDataset):
    """Random tokens of which only the last few are targets; ``num_targets`` says how many."""

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = super().__getitem__(index)
        labels, num_targets = sample["labels"].clone(), 1 + index % (self.seq_len // 2)
        labels[:-num_targets] = -100  # ignored
        return {**sample, "labels": labels, "num_targets": torch.tensor(num_targets)}


class MyTrainer(Trainer):
    """Trains on the mean over sequences of their mean loss."""

    def _init_dataset(self, config: Config) -> None:
        shape = (config.data.mock_data_num_samples, config.train.seq_len, config.model.vocab_size)
        self.train_dataset = Answers(*shape, seed=config.seed.seed)

    def _loss(self, batch: Batch) -> LossSums:
        weight_B1 = 1 / batch.extras["num_targets"][:, None]
        return super()._loss(batch._replace(weights=weight_B1.expand_as(batch.labels)))

    def _normalizer(self, batch: Batch) -> torch.Tensor:
        # With --sep_size ranks share these sequences, so one of them counts; rows that fill up validation do not count.
        return torch.full((), (len(batch.labels) - batch.filling) * (self.sp_rank == 0), device=self.device)


if __name__ == "__main__":
    entry.run(lambda: pretrain.main(trainer=MyTrainer))
