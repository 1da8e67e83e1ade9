"""Your own logger, with a flag of its own: a ``Sink`` gets every record that ``log.jsonl`` gets, here for a CSV table.
``sections`` adds the flag to the command line, to the saved configuration and to ``--print_config``."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tinytron.cli import entry, pretrain
from tinytron.metrics.sinks import Record, RunInfo, Sink
from tinytron.metrics.sinks.files import keep_lines
from tinytron.training import Config, Trainer
from tinytron.utils.flags import Flag


@dataclass(frozen=True)
class CsvConfig:
    """A table of the training records."""

    csv_columns: Annotated[tuple[str, ...], Flag("columns of table.csv after the step", identity=False)] = ("loss",)


class CsvTable(Sink):
    """Writes ``table.csv`` in the run's folder."""

    def open(self, run: RunInfo) -> None:
        self.path, self.names = run.folder / "table.csv", ("step", *run.config["csv"]["csv_columns"])

    def resume(self, step: int) -> None:
        keep_lines(self.path, lambda row: int(row.split(b",")[0]) <= step)

    def write(self, records: Sequence[Record]) -> None:
        rows = [",".join(str(record[name]) for name in self.names) for record in records if record["stage"] == "train"]
        with open(self.path, "a") as file:
            file.writelines(f"{row}\n" for row in rows)


class MyTrainer(Trainer):
    """Also writes the table."""

    sections = {"csv": CsvConfig}

    def _init_reporter(self, config: Config) -> None:
        super()._init_reporter(config)
        self.reporter.add(CsvTable())


if __name__ == "__main__":
    entry.run(lambda: pretrain.main(trainer=MyTrainer))
