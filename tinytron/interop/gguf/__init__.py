"""GGUF files for llama.cpp: its architectures, its tokenizer format, and the file itself."""

from tinytron.interop.gguf.file import ExportedGGUF, export_gguf
from tinytron.interop.gguf.kinds import KINDS

__all__ = ["KINDS", "ExportedGGUF", "export_gguf"]
