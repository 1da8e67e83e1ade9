"""Floor 3: evaluation of a model on held-out data and on tasks."""

from tinytron.evaluation.validate import ValResult, validate

__all__ = ["ValResult", "validate"]
