"""Floor 3: text from a trained model."""

from tinytron.inference.generate import generate

__all__ = ["generate"]
