"""Writes a dataset as shards, for data that does not fit in memory: source=text|idx path=... out=FOLDER.

source=text   path=FILE|FOLDER (UTF-8; null: Python's language reference) tokenizer=byte|char|bpe vocabulary_size=1024
source=idx    path=FOLDER with the four files of MNIST or a similar dataset, gzipped or not (null: the user's cache)
Both          shard_bytes=67108864

Train with data=text_shards or data=image_shards and data.path=FOLDER. docs/data.md has the format and measurements.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from common.config.schema import TokenizerKind
from common.data.datasets import mnist, tokenizer
from common.data.datasets.shards import Index, ShardWriter
from common.data.datasets.text import PARTS, Text
from common.errors import ConfigError
from recipes.commands import parse

from omegaconf import MISSING

INTERRUPTED = 128  # plus the signal's number: the exit status


class Source(Enum):
    """The kind of input."""

    text = 0
    idx = 1


@dataclass
class Arguments:
    """The arguments of the command."""

    source: Source = MISSING
    path: str | None = MISSING
    out: str = MISSING
    tokenizer: TokenizerKind = TokenizerKind.byte
    vocabulary_size: int = 1024
    shard_bytes: int = 64 << 20


class Progress:
    """Progress lines on stdout, at most one per second: bytes done, speed, and estimated time left."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.begin("", 0)

    def begin(self, label: str, total: int) -> None:
        """Starts a pass over `total` bytes."""
        self._label, self._total, self._done = label, total, 0
        self._began = self._said = time.monotonic()

    def add(self, num_bytes: int) -> None:
        """Counts bytes as read, and prints the progress at most once per second."""
        self._done += num_bytes
        now = time.monotonic()
        if now - self._said < 1:
            return
        self._said = now
        rate = self._done / (now - self._began)
        left = int((self._total - self._done) / rate)
        self._say(
            f"{self._label}  {self._done / 1e6:,.0f}/{self._total / 1e6:,.0f} MB  {rate / 1e6:,.1f} MB/s  "
            f"ETA {left // 60}:{left % 60:02}"
        )

    def end(self, index: Index) -> None:
        """Prints what was written."""
        counts = [
            f"{part} {field.count:,} {name}" for part in PARTS for name, field in index.parts[part].fields.items()
        ]
        size = sum(shard.count * field.item_bytes for field, shard in index.shards())
        shards = f"{len(index.shards())} shards of {size:,} bytes together"
        self._say(f"done in {time.monotonic() - self._start:.1f} s: {', '.join(counts)}; {shards}  {index.folder}")

    def _say(self, text: str) -> None:
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def main(words: Sequence[str]) -> None:
    """Writes the dataset as shards.

    Raises:
        ConfigError: the arguments or the data cannot be used.
    """
    arguments = parse(Arguments, words)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # there are no other ranks that need the cores
    try:
        with _leaving_tidily():
            _shard(arguments)
    except OSError as error:
        raise ConfigError(
            [f"{error.filename or arguments.out}: {error.strerror}; choose path and out so that they can be used"]
        ) from error


@contextmanager
def _leaving_tidily() -> Iterator[None]:
    """Within this context, SIGINT and SIGTERM raise SystemExit, so that incomplete output is removed."""
    handlers = {number: signal.signal(number, _leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _leave(number: int, _: object) -> None:
    os.write(sys.stderr.fileno(), b"interrupted before the end; only a finished dataset is kept\n")
    sys.exit(INTERRUPTED + number)


def _shard(arguments: Arguments) -> None:
    progress = Progress()
    with ShardWriter(arguments.out, arguments.shard_bytes) as writer:
        if arguments.source is Source.text:
            index = _write_text(arguments, writer, progress)
        else:
            index = _write_images(arguments, writer, progress)
    progress.end(index)


def _write_text(arguments: Arguments, writer: ShardWriter, progress: Progress) -> Index:
    tokenizer.check_size(arguments.tokenizer, arguments.vocabulary_size, "vocabulary_size")
    text = Text.open(arguments.path, "path", progress.add)
    progress.begin(f"tokenizer={arguments.tokenizer.name}", text.num_bytes["train"])
    trained = text.train_tokenizer(arguments.tokenizer, arguments.vocabulary_size)
    progress.begin("writing", sum(text.num_bytes.values()))
    for part in PARTS:
        for ids in trained.encode_blocks(text.blocks(part)):
            writer.add(part, "tokens", ids)
    return writer.finish("text", text.num_bytes, trained)


def _write_images(arguments: Arguments, writer: ShardWriter, progress: Progress) -> Index:
    folder = mnist.cache_folder() if arguments.path is None else Path(arguments.path)
    missing = mnist.lacking(folder)
    if missing:
        raise ConfigError([f"path={folder}: lacks {', '.join(missing)}; name the folder that has them"])
    for part, prefix in zip(PARTS, ("train", "t10k"), strict=True):
        progress.begin(f"writing {part}", mnist.num_bytes(folder, prefix, "path"))
        for images, classes in mnist.stream_split(folder, prefix, "path"):
            writer.add(part, "images", images)
            writer.add(part, "classes", classes)
            progress.add(images.nbytes + classes.nbytes)
    return writer.finish("images")
