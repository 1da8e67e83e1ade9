"""Package metadata. Exact versions used by the tests are in constraints.txt: ``pip install -c constraints.txt -e .``"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
QUICKSTART = ["tokenizers", "matplotlib"]
DATA = ["datasets", "transformers", "tokenizers", "tiktoken"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]

setup(
    name="tinytron",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "tinytron" / "__init__.py").read_text())[1],
    description="A from-scratch, hackable, distributed PyTorch stack that pre-trains GPT-style language models",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=find_packages(include=["tinytron", "tinytron.*"]),
    package_data={"tinytron.observe": ["page/*", "page/vendor/*"], "tinytron.dispatch": ["job.sh"]},
    python_requires=">=3.10",
    entry_points={"console_scripts": ["tinytron = tinytron.cli.main:run"]},
    install_requires=["torch>=2.11", "numpy", "tqdm"],
    extras_require={
        "quickstart": QUICKSTART,
        "report": ["matplotlib"],
        "data": DATA,
        "flash-attn": ["flash-attn"],
        "liger-kernel": ["liger-kernel>=0.8.5"],
        "cut-cross-entropy": ["cut-cross-entropy"],
        "tensorboard": ["tensorboard"],
        "wandb": ["wandb"],
        "lm-eval": ["lm-eval"],
        "hub": ["huggingface_hub"],
        "gguf": ["gguf"],
        "config": ["pyyaml"],
        "docs": DOCS,
        "cli": ["omegaconf"],
        "s3": ["s3fs"],
        "gcs": ["gcsfs"],
        "dev": [
            *QUICKSTART,
            *DOCS,
            *("pytest", "pytest-xdist", "hypothesis", "ruff", "mypy", "types-tqdm", "datasets", "transformers", "s3fs"),
            *("moto[server]", "pyyaml", "omegaconf", "peft", "tensorboard", "wandb"),
            *("tiktoken", "gguf", 'triton; platform_system == "Linux"'),
        ],
    },
)
