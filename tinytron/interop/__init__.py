"""Floor 3: models of Hugging Face in and out."""

from tinytron.interop.architectures import write_architecture
from tinytron.interop.load import load_pretrained, model_options
from tinytron.interop.upload import HubUploader, check_repository

__all__ = ["HubUploader", "check_repository", "load_pretrained", "model_options", "write_architecture"]
