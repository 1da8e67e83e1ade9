"""``python -m tinytron``: the ``tinytron`` command of a checkout that is not installed."""

from tinytron.cli.main import run

if __name__ == "__main__":
    run()
