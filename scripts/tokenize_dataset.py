"""``tinytron tokenize`` under its documented name; ``--help`` shows the options. As in timl, the shards go to
``--cache_dir`` if that is given and ``--output_dir`` is not."""

from tinytron.cli import entry, tokenize

if __name__ == "__main__":
    entry.run(lambda: tokenize.main(into_cache=True))
