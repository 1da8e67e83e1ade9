"""Floor 3: import and export of Hugging Face models."""

from tinytron.interop.architectures import write_architecture
from tinytron.interop.load import about_ignored, load_pretrained, model_options
from tinytron.interop.upload import HubUploader, check_repository

__all__ = [
    "HubUploader", "about_ignored", "check_repository", "load_pretrained", "model_options", "write_architecture",
]  # fmt: skip
