"""Text as tokens: UTF-8 files, or Python's language reference, which comes with CPython.

The last tenth of the bytes is held out. Each block of text is encoded separately, and the blocks' ends depend only on
the text; so the tokens are the same whether the text is read into memory or written to shards.
"""

import io
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from common import file_io
from common.config.schema import TextConfig, TokenizerKind
from common.data.datasets import tokenizer as tokenizers
from common.data.datasets.examples import Array, Batch
from common.data.datasets.fingerprint import fingerprint
from common.data.datasets.tokenizer import Tokenizer
from common.errors import ConfigError

import numpy as np

PARTS = ("train", "test")
HELD_OUT = 10  # one of HELD_OUT bytes is held out
BLOCK_BYTES = 1 << 16
# Byte-pair encoding is trained on about this many bytes, spread over the training part. Its memory grows with the
# number of different words: 2 MiB of words that are all different take 300 MB (docs/data.md).
SAMPLE_BYTES = 2 << 20


@dataclass(frozen=True)
class Windows:
    """A text cut into examples of `context` tokens, each with the token that follows.

    Attributes:
        tokens: (N,) integers.
        context: number of tokens per example.
        num_bytes: number of UTF-8 bytes of the text.
        fingerprint: SHA-256 of the tokens, in hexadecimal.
    """

    tokens: Array
    context: int
    num_bytes: int
    fingerprint: str

    @classmethod
    def of(cls, tokens: Array, context: int, num_bytes: int) -> "Windows":
        """The examples of these tokens."""
        return cls(tokens, context, num_bytes, fingerprint(tokens=tokens))

    def __len__(self) -> int:
        return max(0, len(self.tokens) - 1) // self.context

    def get_batch(self, examples: np.ndarray | slice, epoch: int = 0) -> Batch:
        """The chosen examples: inputs (B, T) int64 and targets (B, T) int64, each input's next token."""
        numbers = np.arange(*examples.indices(len(self))) if isinstance(examples, slice) else examples.astype(np.int64)
        windows = self.tokens[numbers[:, None] * self.context + np.arange(self.context + 1)]
        return windows[:, :-1].astype(np.int64), windows[:, 1:].astype(np.int64)


@dataclass(frozen=True)
class Corpus:
    """The examples of a text.

    Attributes:
        train: the first nine tenths of the text.
        test: the last tenth.
        tokenizer: the tokenizer of both, trained on the training part.
    """

    train: Windows
    test: Windows
    tokenizer: Tokenizer

    def check(self, name: str) -> "Corpus":
        """Checks that both parts have at least one example; returns self.

        Args:
            name: the source of the text as key=value, for the message.

        Raises:
            ConfigError: a part is too short.
        """
        problems = []
        for part, windows in (("training", self.train), ("held-out", self.test)):
            size = len(windows.tokens)
            if not len(windows):
                shorter = f"a model.context of at most {size - 1}, or " if size > 1 else ""
                problems.append(
                    f"{name}: the {part} part has {size} tokens, too few for one example, which has "
                    f"model.context={windows.context} tokens and the one after; use {shorter}more text"
                )
        if problems:
            raise ConfigError(problems)
        return self


class Document(NamedTuple):
    """A UTF-8 text.

    Attributes:
        path: the path of its file, or a name for it.
        num_bytes: the size in bytes.
        content: the text; None: it is read from the file.
    """

    path: str
    num_bytes: int
    content: bytes | None = None

    def open(self) -> BinaryIO:
        """Opens the text for reading."""
        return file_io.open_regular(Path(self.path)) if self.content is None else io.BytesIO(self.content)


@dataclass(frozen=True)
class Text:
    """Documents one after another; the last tenth of their bytes is held out.

    Attributes:
        name: the source of the documents as key=value, for messages.
        documents: the documents, at least HELD_OUT bytes together.
        num_bytes: the size in bytes of each of the PARTS.
        on_read: called with the number of bytes of each block that is read.
    """

    name: str
    documents: Sequence[Document]
    num_bytes: dict[str, int]
    on_read: Callable[[int], object]

    @classmethod
    def open(
        cls, path: str | None, key: str = "data.path", on_read: Callable[[int], object] = lambda _: None
    ) -> "Text":
        """Finds the documents.

        Args:
            path: a file, or a folder with files (hidden ones are ignored); None: the language reference.
            key: the configuration key of the path, for messages.
            on_read: called with the number of bytes of each block that is read.

        Raises:
            ConfigError: there are no documents, they cannot be read, or they are too short to hold out a tenth.
        """
        name = f"{key}={'null' if path is None else path}"
        with _readable(name):
            documents = [_language_reference()] if path is None else list(_files(Path(path), name))
            size = sum(document.num_bytes for document in documents)
            if size < HELD_OUT:
                raise ConfigError(
                    [f"{name}: has {size} bytes of text, too few to hold out a tenth for the test; use more text"]
                )
            cut = _character_start(documents, size - size // HELD_OUT)
        return cls(name, documents, {"train": cut, "test": size - cut}, on_read)

    def blocks(self, part: str) -> Iterator[str]:
        """The text of a part in blocks of about BLOCK_BYTES, each within one document.

        Raises:
            ConfigError: a document is not UTF-8.
        """
        start = 0 if part == "train" else self.num_bytes["train"]
        stop = start + self.num_bytes[part]
        offset = 0
        for document in self.documents:
            first, last = max(start - offset, 0), min(stop - offset, document.num_bytes)
            if first < last:
                yield from self._document_blocks(document, first, last)
            offset += document.num_bytes

    def _document_blocks(self, document: Document, first: int, last: int) -> Iterator[str]:
        """The bytes first .. last - 1 of a document; a block never ends within a character."""
        with _readable(self.name), document.open() as file:
            file.seek(first)
            begun = b""
            while (position := file.tell()) < last:
                content = file.read(min(BLOCK_BYTES - len(begun), last - position))
                if not content:
                    raise ConfigError([f"{self.name}: {document.path} became shorter while it was read; start again"])
                self.on_read(len(content))
                origin, content = position - len(begun), begun + content
                end = len(content) if file.tell() == last else _last_character(content)
                begun = content[end:]
                try:
                    yield content[:end].decode()
                except UnicodeDecodeError as error:
                    raise self._not_utf8(document, origin + error.start) from error

    def _not_utf8(self, document: Document, number: int) -> ConfigError:
        return ConfigError(
            [
                f"{self.name}: {document.path} is not UTF-8 (at byte {number}); convert it (iconv -t UTF-8), or take "
                "it out if it is not a text"
            ]
        )

    def train_tokenizer(self, kind: TokenizerKind, vocabulary_size: int) -> Tokenizer:
        """Trains a tokenizer on the training part; bpe uses about SAMPLE_BYTES of it."""
        blocks = self.blocks("train")
        if kind is TokenizerKind.bpe:
            blocks = _sample(blocks, self.num_bytes["train"])
        return tokenizers.train(kind, blocks, vocabulary_size)


def load(cfg: TextConfig, context: int) -> Corpus:
    """Loads text as tokens into memory, in examples of `context` tokens.

    Raises:
        ConfigError: there is no such text, it is not UTF-8, or it is too short for one example.
    """
    tokenizers.check_size(cfg.tokenizer, cfg.vocabulary_size, "data.vocabulary_size")
    text = Text.open(cfg.path)
    tokenizer = text.train_tokenizer(cfg.tokenizer, cfg.vocabulary_size)
    train, test = (
        Windows.of(np.concatenate(list(tokenizer.encode_blocks(text.blocks(part)))), context, text.num_bytes[part])
        for part in PARTS
    )
    return Corpus(train, test, tokenizer).check(text.name)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Converts an OSError about a file or folder to a ConfigError."""
    try:
        yield
    except OSError as error:
        message = f"{name}: {error.filename} cannot be read ({error.strerror}); make it readable, or take it out"
        raise ConfigError([message]) from error


def _language_reference() -> Document:
    """The texts that Python's help() shows for keywords and language rules."""
    from pydoc_data.topics import topics

    content = "".join(topics[name] for name in sorted(topics)).encode()
    return Document("pydoc_data.topics", len(content), content)


def _files(path: Path, name: str) -> Iterator[Document]:
    """The file, or all files below the folder that are not hidden, sorted by relative path."""
    if path.is_file():
        yield Document(str(path), path.stat().st_size)
        return
    if not path.is_dir():
        raise ConfigError([f"{name}: there is no such file or folder; name a UTF-8 file or a folder of them"])
    for relative in sorted(_below(path)):
        file = path / relative
        yield Document(str(file), file.stat().st_size)


def _below(folder: Path) -> Iterator[str]:
    for parent, folders, files in os.walk(folder, onerror=_refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        yield from (path.relative_to(folder).as_posix() for path in paths if path.is_file())


def _refuse(error: OSError) -> None:
    """Raises the error: os.walk() would skip a folder that cannot be read."""
    raise error


def _character_start(documents: Iterable[Document], position: int) -> int:
    """The position in the documents' bytes, moved back to the start of its character."""
    offset = 0
    for document in documents:
        if position < offset + document.num_bytes:
            break
        offset += document.num_bytes
    start = max(position - offset - 3, 0)  # a character has at most four bytes
    with document.open() as file:
        file.seek(start)
        content = file.read(position - offset - start + 1)
    return offset + start + _last_character(content)


def _last_character(content: bytes) -> int:
    """The index at which the last character starts, within the last four bytes."""
    last = len(content) - 1
    starts = (place for place in range(last, max(last - 4, -1), -1) if content[place] & 0xC0 != 0x80)
    return next(starts, last)


def _sample(blocks: Iterable[str], num_bytes: int) -> Iterator[str]:
    """All blocks of a short text, else evenly spaced blocks of about SAMPLE_BYTES together."""
    seen = taken = 0
    for block in blocks:
        size = len(block.encode())
        if taken * num_bytes <= seen * SAMPLE_BYTES:
            yield block
            taken += size
        seen += size
