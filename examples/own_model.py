"""Your own model: ``_init_model`` sets any module that maps token ids and labels to ``LossSums``, here a recurrent one.

``tinytron/model/protocols.py`` lists what a model may have beyond that, such as ``end_step``, called after every step.
"""

import torch
import torch.nn as nn

from tinytron.cli import entry, pretrain
from tinytron.model.modules.loss import LossSums, fused_linear_cross_entropy
from tinytron.training import Config, Trainer


class GRUModel(nn.Module):
    """Predicts the next token by a gated recurrent unit. It needs whole sequences: --sep_size 1."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size, bias=False)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> LossSums:
        hidden_BSD, _ = self.gru(self.embedding(input_ids))
        return fused_linear_cross_entropy(hidden_BSD.flatten(0, 1), self.head.weight, labels.flatten())

    def end_step(self, skipped: torch.Tensor | None = None) -> None:
        """Count the updates; ``skipped`` is 1, on the device, if the optimizer rejected the step."""
        self.updates += 1 if skipped is None else 1 - skipped.long()


class MyTrainer(Trainer):
    """Trains the recurrent model; its width is ``--hidden_size``."""

    def _init_model(self, config: Config) -> None:
        torch.manual_seed(config.seed.seed)
        self.raw_model = self.model = GRUModel(config.model.vocab_size, config.model.hidden_size).to(self.device)


if __name__ == "__main__":
    entry.run(lambda: pretrain.main(trainer=MyTrainer))
