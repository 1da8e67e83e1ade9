"""Floor 3: validation."""

from tinytron.evaluation.validate import ValResult, validate

__all__ = ["ValResult", "validate"]
