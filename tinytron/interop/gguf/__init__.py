"""GGUF files for llama.cpp: its architectures, its form of a tokenizer, and the file."""

from tinytron.interop.gguf.file import ExportedGGUF, export_gguf
from tinytron.interop.gguf.kinds import KINDS

__all__ = ["KINDS", "ExportedGGUF", "export_gguf"]
