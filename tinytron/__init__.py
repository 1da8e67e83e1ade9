"""Tinytron: a from-scratch, hackable, distributed stack that pre-trains GPT-style language models."""

__version__ = "0.1.0"
