"""Models beyond the GPT. To add one, add a module here and a line below; a trainer names it as its ``MODEL``."""

from tinytron.model.gpt import GPT
from tinytron.model.models.base import LanguageModel

__all__ = ["GPT", "LanguageModel"]
