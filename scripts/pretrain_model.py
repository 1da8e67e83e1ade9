"""timl's training command with its own flags; ``--help`` shows them."""

from tinytron.cli import entry, timl

if __name__ == "__main__":
    entry.run(timl.main)
