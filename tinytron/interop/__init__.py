"""Floor 3: models of Hugging Face in and out."""

from tinytron.interop.architectures import write_architecture
from tinytron.interop.load import about_ignored, load_pretrained, model_options
from tinytron.interop.upload import HubUploader, check_repository

__all__ = [
    "HubUploader", "about_ignored", "check_repository", "load_pretrained", "model_options", "write_architecture",
]  # fmt: skip
