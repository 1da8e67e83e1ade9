"""Floor 3: how good a model is, on held-out data and on tasks."""

from tinytron.evaluation.validate import ValResult, validate

__all__ = ["ValResult", "validate"]
