"""Floor 2: parameter groups, Muon and learning-rate schedules."""

from tinytron.optim.groups import parameter_groups
from tinytron.optim.muon import Muon
from tinytron.optim.schedule import Schedule

__all__ = ["Muon", "Schedule", "parameter_groups"]
