"""Text to token shards: in many processes, in one order, and resumable after any interruption.

source -> chunks -> workers (read, split off validation, encode) -> in order -> shards and sidecars -> manifest.json

Whenever shards have been finished, and when it is asked to stop, the pipeline writes a state file: the place in the source,
the tokens that are in no shard yet, and a record of the inputs. Until the manifest exists, the same call continues from
that file.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from tinytron.data.manifest import (
    MANIFEST,
    TOKENIZER,
    Manifest,
    ShardFacts,
    TokenizerFacts,
    read_manifest,
    write_manifest,
)
from tinytron.data.shards import names_gone, open_shards
from tinytron.errors import ConfigError, DataError
from tinytron.text import tokenizers
from tinytron.text.chunk_encoder import ChunkEncoder
from tinytron.text.encoders import SIDES, DocumentEncoder, text_of
from tinytron.text.inputs import Documents, documents_of, encoder_of, load_tokenizer, tokenizer_facts
from tinytron.text.options import TokenizeOptions
from tinytron.text.rates import Rates
from tinytron.text.selection import VAL
from tinytron.text.sources import START, FileSource
from tinytron.text.state import STATE, Recipe, State, difference, read_state, recipe_in, recipe_of, write_state
from tinytron.text.token_writer import SplitWriter, shard_name
from tinytron.text.tokenizers import TextTokenizer
from tinytron.text.train import train_tokenizer
from tinytron.text.worker_pool import WorkerPool
from tinytron.utils.lock import wait_for_lock
from tinytron.utils.progress import Progress
from tinytron.utils.signals import StopRequest
from tinytron.utils.texts import whole_characters
from tinytron.utils.training import write_atomically

LOCK = "tokenize.lock"
OURS = re.compile(r".+_\d{6}\.(bin|docs|weights)(\.tmp)?")


@dataclass(frozen=True)
class Outcome:
    """The ``manifest``, or the signal that stopped the call; ``fresh`` if this call did any work."""

    folder: Path
    manifest: Manifest | None
    received: int = 0
    fresh: bool = True


def tokenize_dataset(
    options: TokenizeOptions,
    stop: StopRequest | None = None,
    say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    *,
    tokenizer: TextTokenizer | None = None,
    repair: bool = False,
) -> Outcome:
    """Write ``options.folder``, unless it is already complete, or continue what an earlier call began. ``say`` gets
    progress messages; ``tokenizer`` is the one of the options, if it is already loaded; with ``repair``, a finished folder
    is made again if its shards do not match its manifest.

    Raises: ConfigError and DataError for options that do not fit each other, the source or the contents of the folder;
    DataError if the folder cannot be written.
    """
    documents = documents_of(options)
    if tokenizer is None and not options.trains:
        tokenizer = load_tokenizer(options)
    if tokenizer is not None:
        # Raises before anything is written if the tokenizer does not fit.
        encoder_of(options, documents.kind, tokenizer, tokenizer_facts(tokenizer, options))
    try:
        options.folder.mkdir(parents=True, exist_ok=True)
        with wait_for_lock(options.folder / LOCK, say):
            damaged = repair and (options.folder / MANIFEST).exists() and finished(options.folder) is None
            if options.overwrite or damaged:
                _clear(options.folder)
            if documents.note:
                say(documents.note)
            return _Run(options, documents, stop or StopRequest(), say).run(tokenizer)
    except OSError as error:
        raise DataError(
            f"--output_dir {options.folder} cannot be written ({error.strerror or error}); use a disk with space. "
            "The same call continues from here"
        ) from error


def finished(folder: Path) -> Manifest | None:
    """The manifest of a folder whose tokenization is complete and whose shards match the manifest in name and size, else
    ``None``."""
    with contextlib.suppress(DataError, OSError):
        manifest = read_manifest(folder)
        if manifest is not None and manifest.complete:
            names = sorted(shard.name for shard in manifest.shards)
            shards = open_shards([folder / name for name in names])
            if manifest.weighted and any(shard.weights is None for shard in shards):
                return None
            return manifest if names == sorted(path.name for path in folder.glob("*.bin")) else None
    return None


class _Run:
    """One call, which has the folder's lock."""

    def __init__(
        self, options: TokenizeOptions, documents: Documents, stop: StopRequest, say: Callable[[str], object]
    ) -> None:
        self.options, self.documents, self.stop, self.say = options, documents, stop, say
        self.folder = options.folder
        self.source = source = documents.source
        self.ends_held_out = isinstance(source, FileSource) and source.held_out_end > 0
        # If the ends of texts are held out, no text is held out by its hash.
        self.rule = replace(options.rule, val_fraction=0.0) if self.ends_held_out else options.rule
        splits = [options.split]
        if options.val_fraction or options.val_path is not None:
            splits.append(VAL)

        def writer_of(name: str) -> SplitWriter:
            fixed = (options.dtype, options.file_format, options.shard_size)
            return SplitWriter(self.folder, name, *fixed, weighted=options.weighted, row=options.block_size)

        # The writers of each split, one for each side of the documents.
        self.writers_of = {s: [writer_of(f"{s}{side}") for side in SIDES[documents.kind]] for s in splits}
        for writer in self.writers_of[options.split]:
            writer.first, writer.last = options.min_file_index, options.max_file_index
        self.writers = {writer.split: writer for writers in self.writers_of.values() for writer in writers}
        self.main = self.writers_of[options.split][0]
        self.place, self.done, self.empty = START, 0, 0

    def run(self, tokenizer: TextTokenizer | None) -> Outcome:
        """Begin, continue, or return the finished folder."""
        state, manifest = read_state(self.folder), read_manifest(self.folder)
        begun = state is not None or manifest is not None
        if not begun and any(OURS.fullmatch(path.name) for path in self.folder.iterdir()):
            raise DataError(
                f"--output_dir {self.folder} contains shards from elsewhere; use another folder, or --overwrite"
            )
        if tokenizer is None:
            tokenizer = self._trained(begun)
        facts = tokenizer_facts(tokenizer, self.options)
        encoder = encoder_of(self.options, self.documents.kind, tokenizer, facts)
        recipe = recipe_of(self.options, self.documents.identity(), facts, encoder.identity())
        for there in (state.recipe if state else None, recipe_in(manifest) if manifest else None):
            self._require_same(recipe, there)
        if manifest is not None and manifest.complete:
            return self._found(manifest)
        if state is not None:
            self._restore(state)
        if manifest is not None and self.main.done:
            return self._found(manifest)
        self._begin(tokenizer, recipe)
        self._tokenize(encoder, recipe)
        if self.stop.received:
            return Outcome(self.folder, None, self.stop.received)
        return Outcome(self.folder, self._finish(facts, recipe))

    # The folder as found.

    def _trained(self, begun: bool) -> TextTokenizer:
        """The tokenizer that the folder has, or a new one."""
        path, options = self.folder / TOKENIZER, self.options
        if not begun:
            found = self._texts("reading text for the tokenizer")
            kind, system = self.documents.kind, options.system_prompt
            texts = ((text_of(kind, text, system) if split else text, split) for text, split in found)
            trained = train_tokenizer(options, texts, self.say)
            write_atomically(path, lambda file: file.write(trained))
        return tokenizers.from_file(path, options.kind, str(getattr(options, options.kind)).lower())

    def _texts(self, what: str) -> Iterator[tuple[str, str | None]]:
        """Every text, with its split. ``what`` names the work in the progress that is shown."""
        total, unit = self.source.size()
        with Progress(what, total, unit) as progress:
            for chunk in self.source.chunks(self.options.chunksize):
                for text in map(whole_characters, self.source.read(chunk)):
                    yield text, self.rule.split_of(text, chunk.held_out)
                progress.update(chunk.done - progress.done)

    def _require_same(self, recipe: Recipe, there: Recipe | None) -> None:
        if there is not None and (text := difference(recipe, there)) is not None:
            raise ConfigError(
                f"--output_dir {self.folder} was made with other options: {text}; use another folder, or --overwrite"
            )

    def _restore(self, state: State) -> None:
        state.restore(self.writers)
        self.place, self.done, self.empty = state.place, state.done, state.empty
        self._require_files({shard.name for shard in self.main.shards}, self.main.index)

    def _require_files(self, names: set[str], stop: int) -> None:
        """Refuse a folder whose first files an earlier call left out because of ``--min_file_index``."""
        last = self.options.max_file_index
        for index in range(self.options.min_file_index, stop if last is None else min(stop, last + 1)):
            if shard_name(self.main.split, index) not in names:
                raise ConfigError(
                    f"--min_file_index {self.options.min_file_index}: an earlier call left file {index} out of "
                    f"{self.folder}; use another folder, or --overwrite"
                )

    def _found(self, manifest: Manifest) -> Outcome:
        names = [shard.name for shard in manifest.shards_of(self.main.split)]
        self._require_files(set(names), 1 + max((int(n[-10:-4]) for n in names), default=-1))
        for name in names_gone(manifest.shards, self.options.dtype.itemsize, self.folder)[:1]:
            raise DataError(f"{self.folder / name} is missing; tokenize again with --overwrite")
        if manifest.complete:
            (self.folder / STATE).unlink(missing_ok=True)
        return Outcome(self.folder, manifest, fresh=False)

    # Work.

    def _begin(self, tokenizer: TextTokenizer, recipe: Recipe) -> None:
        self.source.size()  # a source that cannot be loaded raises here
        if self.ends_held_out:
            self.say(
                f"held out: the last {self.options.val_fraction:.3g} of every file, because there are few documents"
            )
        (self.folder / MANIFEST).unlink(missing_ok=True)
        if tokenizer.serialized:
            write_atomically(self.folder / TOKENIZER, lambda file: file.write(tokenizer.serialized))
        if self.place == START:
            self._save(recipe)
        else:
            self.say(f"continuing after {sum(len(w.shards) for w in self.writers.values())} finished shards")
        if (index := self.main.index) < self.options.min_file_index:
            dropped = f"{index} to {self.options.min_file_index - 1}"
            self.say(f"files {dropped} are tokenized and dropped, because {self.folder} does not record where they end")

    def _save(self, recipe: Recipe) -> None:
        write_state(self.folder, recipe, self.writers, self.place, self.done, self.empty)

    def _tokenize(self, encoder: DocumentEncoder, recipe: Recipe) -> None:
        work = ChunkEncoder(self.source, encoder, self.rule)
        self._write_full(recipe)  # shards that an earlier ``--max_file_index`` left for later
        if self.main.done or self._room() == 0:
            return
        with WorkerPool(work, self.options.workers) as pool, Rates(self.source, self.done) as rates:
            chunks = self.source.chunks(self.options.chunksize, self.place)
            for chunk, made in pool.map(chunks, lambda: bool(self.stop.received)):
                if (room := self._room()) is not None:
                    made = made.until(room)
                for split, writers in self.writers_of.items():
                    for writer, tokens in zip(writers, made.splits[split], strict=True):
                        writer.add(tokens)
                self.place, self.done, self.empty = chunk.after, chunk.done, self.empty + made.empty
                self._write_full(recipe)
                rates.update(chunk.done, made)
                if self.main.done or self._room() == 0:
                    break
        self.say(rates.summary())
        if self.stop.received:
            self._save(recipe)

    def _room(self) -> int | None:
        """Number of tokens until ``--max_tokens``; ``None`` without a limit."""
        if self.options.max_tokens is None:
            return None
        return max(0, self.options.max_tokens - sum(writer.total for writer in self.writers.values()))

    def _write_full(self, recipe: Recipe) -> None:
        if sum([writer.write_full() for writer in self.writers.values()]):
            self._save(recipe)

    def _finish(self, facts: TokenizerFacts, recipe: Recipe) -> Manifest:
        """Write the incomplete last shards and the manifest; keep the state unless the source has ended."""
        complete, shards = not self.main.done, list[ShardFacts]()
        documents, tokens = dict[str, int](), dict[str, int]()
        for split, writer in self.writers.items():
            rest = writer.write_rest()
            mine = [*writer.shards, *([rest] if rest else [])]
            documents[split] = sum(shard.documents for shard in mine)
            tokens[split] = sum(shard.tokens for shard in mine)
            shards += mine
        if self.options.min_file_index and not documents[self.main.split]:
            _clear(self.folder)
            last = self.main.index if self.main.held else self.main.index - 1
            raise DataError(
                f"--min_file_index {self.options.min_file_index}: the data ends in file {last}; use a smaller one"
            )
        if not shards:
            _clear(self.folder)
            raise self._nothing_kept()
        if complete and len(self.writers_of) > 1 and not all(documents.values()):
            _clear(self.folder)
            raise self._empty_split(documents)
        manifest = Manifest(
            dtype=self.options.token_dtype,
            file_format=self.options.file_format,
            tokenizer=facts,
            source=recipe["source"],
            options=recipe["options"],
            command=self.options.command(),
            documents=documents,
            tokens=tokens,
            empty=self.empty,
            complete=complete,
            shards=shards,
        )
        write_manifest(self.folder, manifest)
        if complete:
            (self.folder / STATE).unlink(missing_ok=True)
        return manifest

    def _empty_split(self, documents: dict[str, int]) -> DataError:
        """The error for a split that got no documents."""
        empty = next(split for split, count in documents.items() if not count).partition(".")[0]
        options, count = self.options, sum(documents.values()) // len(SIDES[self.documents.kind])
        if options.val_path:
            place = f"--val_path {options.val_path}" if empty == "val" else f"--dataset_path {options.dataset_path}"
            return DataError(f"{place} has no document to keep for {empty}; use another, or a smaller --min_chars")
        return DataError(
            f"--val_fraction {options.val_fraction:g}: none of {count} documents goes to {empty} (a hash of the text "
            "decides); use more documents, another --val_fraction, or --val_path FILE"
        )

    def _nothing_kept(self) -> DataError:
        """The error for a source without a document to tokenize; looks for the longest one."""
        path, least = self.options.dataset_path, self.options.min_chars
        sizes = [len(text.strip()) for text, _ in self._texts("looking for the longest document")]
        if not least or not any(sizes):
            return DataError(f"--dataset_path {path} has no document with text; use another")
        return DataError(
            f"--dataset_path {path}: none of {len(sizes)} documents has --min_chars {least} characters; use --min_chars "
            f"{max(sizes)} or less"
        )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if OURS.fullmatch(path.name) or path.name.removesuffix(".tmp") in (MANIFEST, STATE, TOKENIZER):
            path.unlink()
