"""Memory of training steps on a GPU, in a process whose allocator has seen nothing else:

    python -m tests.gpu.measured '["--num_layer", "2"]' '["--num_layer", "4"]'

prints one line of JSON per list of flags: bytes allocated before the trainer was made, between two steps, and at the peak;
or the error.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist

from tests.helpers.runs import config_of
from tinytron.training import Trainer


def measured(flags: Sequence[object]) -> dict[str, int]:
    """Bytes ``before``, ``held`` after two steps, and at the ``peak`` of the start and three steps."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config_of(*flags, "--log_dir", folder))
        steps = trainer._microbatches()
        for _ in range(2):
            trainer.train_step(next(steps))
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        trainer.train_step(next(steps))
        torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated()
    model = weakref.ref(trainer.raw_model)
    del trainer, steps
    dist.destroy_process_group()
    gc.collect()
    assert model() is None, "something keeps the model: the next measurement would be wrong"
    return {"before": before, "held": held, "peak": peak}


def main() -> None:
    """Measure every list of flags of the command line; an error is reported, and the next list measured."""
    for text in sys.argv[1:]:
        try:
            result: dict[str, object] = dict(measured(json.loads(text)))
        except Exception as error:
            result = {"error": f"{type(error).__name__}: {error}"}
            if dist.is_initialized():
                dist.destroy_process_group()
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
