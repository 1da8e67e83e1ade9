"""Floor 2: parameter groups and learning-rate schedules."""

from tinytron.optim.groups import decay_groups
from tinytron.optim.schedule import Schedule

__all__ = ["Schedule", "decay_groups"]
