"""Floor 3: evaluation of a model on held-out data and on tasks."""

from tinytron.evaluation.kinds import (
    EncodingEvaluation,
    Evaluation,
    PerplexityComparisonEvaluation,
    PerplexityEvaluation,
    RolloutEvaluation,
)
from tinytron.evaluation.validate import ValResult, validate

__all__ = [
    "EncodingEvaluation",
    "Evaluation",
    "PerplexityComparisonEvaluation",
    "PerplexityEvaluation",
    "RolloutEvaluation",
    "ValResult",
    "validate",
]
