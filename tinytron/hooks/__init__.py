"""Floor 2: named points in a model's forward pass, where one can record, replace or perturb."""

from tinytron.hooks.points import HasPoints, attached, points_of, selected
from tinytron.hooks.session import Seen, on

__all__ = ["HasPoints", "Seen", "attached", "on", "points_of", "selected"]
