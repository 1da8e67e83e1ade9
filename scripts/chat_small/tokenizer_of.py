"""Chat on a small model: print the tokenizer.json of a run's data.

python scripts/chat_small/tokenizer_of.py log/quickstart/quickstart_...
"""

from __future__ import annotations

import sys
from pathlib import Path

from tinytron.checkpoint.model import saved_model
from tinytron.cli import entry
from tinytron.data.manifest import TOKENIZER
from tinytron.errors import ConfigError
from tinytron.text.run_tokenizer import tokenizers_of_data


def main() -> None:
    """Print the path."""
    saved = saved_model(Path(sys.argv[1]), check=False)
    if (own := saved.file.with_name(TOKENIZER)).is_file():
        print(own)
        return
    files = tokenizers_of_data(saved.section("data").get("dataset_path")).files
    if not files:
        raise ConfigError(f"the data of {sys.argv[1]} has no {TOKENIZER}; use a run whose data tinytron tokenize made")
    print(files[0])


if __name__ == "__main__":
    entry.run(main)
