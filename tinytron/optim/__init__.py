"""Floor 2: parameter groups, Muon and learning-rate schedules."""

from tinytron.optim.groups import parameter_groups
from tinytron.optim.muon import Muon
from tinytron.optim.rates import Rates
from tinytron.optim.schedule import Schedule

__all__ = ["Muon", "Rates", "Schedule", "parameter_groups"]
