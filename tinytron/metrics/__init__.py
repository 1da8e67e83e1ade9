"""Floor 2: measurements of a run, and the sinks that show and store them."""

from tinytron.metrics.clock import TrainClock
from tinytron.metrics.expert_load import load_statistics
from tinytron.metrics.routing import RoutingReport
from tinytron.metrics.sources import SourceLosses
from tinytron.metrics.spikes import SpikeDetector
from tinytron.metrics.window import StepRecord, StepWindow

__all__ = [
    "RoutingReport",
    "SourceLosses",
    "SpikeDetector",
    "StepRecord",
    "StepWindow",
    "TrainClock",
    "load_statistics",
]
