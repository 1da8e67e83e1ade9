"""gpt2fun's training command with its own flags; ``--help`` shows them."""

from tinytron.cli import entry, gpt2fun

if __name__ == "__main__":
    entry.run(lambda: gpt2fun.main(script=__file__))
