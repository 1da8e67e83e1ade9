"""``tinytron tokenize`` under its documented name; ``--help`` shows the options."""

from tinytron.cli import entry, tokenize

if __name__ == "__main__":
    entry.run(tokenize.main)
