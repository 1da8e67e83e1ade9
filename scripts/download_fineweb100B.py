"""gpt2fun's download command: FineWeb as gpt2 tokens, into ``--target_dir``; ``--help`` shows further flags."""

import sys

import download_fineweb  # its folder is on the path of a script

from tinytron.cli import entry

if __name__ == "__main__":
    entry.run(lambda: download_fineweb.main(["--tokens", "gpt2", *sys.argv[1:]]))
