"""Tokenizers: bytes, characters, or byte-pair encoding.

Byte-pair encoding: Sennrich, Haddow and Birch, 2016, https://aclanthology.org/P16-1162; over bytes, as here: Radford et
al., "Language models are unsupervised multitask learners", 2019. The implementation is that of the tokenizers library,
which is imported only if it is needed.
"""

import codecs
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common.config.schema import TokenizerKind
from common.errors import ConfigError

import numpy as np

SMALLEST_BPE = 257  # 256 bytes and one pair
LARGEST_BPE = 1 << 16  # the largest size for which the memory of training was measured
# Longer words, as in text without spaces, are cut: time and memory of training grow with the length of the longest one.
MAX_WORD_BYTES = 32
BLOCKS_AT_ONCE = 16  # encoded in parallel if TOKENIZERS_PARALLELISM=true


class Tokenizer(ABC):
    """Converts text to token ids and back.

    Args:
        pieces: for each id, the UTF-8 bytes of its token, which may be part of a character.
    """

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.pieces = pieces

    @property
    def vocabulary_size(self) -> int:
        """Number of ids: 0 .. vocabulary_size - 1."""
        return len(self.pieces)

    @property
    def dtype(self) -> np.dtype:
        """The smallest of uint8, uint16 and uint32 that can hold the ids."""
        return np.min_scalar_type(self.vocabulary_size - 1)

    @abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: (N,) of the tokenizer's dtype."""

    def encode_blocks(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each block, which is encoded separately: (N,) of the tokenizer's dtype."""
        return map(self.encode, blocks)

    def decode(self, ids: Iterable[int]) -> str:
        """The text of the ids; bytes of incomplete characters become U+FFFD."""
        return b"".join(self.pieces[token] for token in ids).decode("utf-8", "replace")

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """The description for from_json(), as JSON values."""


class ByteTokenizer(Tokenizer):
    """A token is a byte of the text in UTF-8."""

    def __init__(self) -> None:
        super().__init__([bytes([byte]) for byte in range(256)])

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: (N,) uint8."""
        return np.frombuffer(text.encode(), np.uint8)

    def to_json(self) -> dict[str, Any]:
        """The kind of tokenizer."""
        return {"kind": TokenizerKind.byte.name}


class CharTokenizer(Tokenizer):
    """A token is a character; the last id stands for all characters outside the alphabet.

    Args:
        alphabet: the characters in the order of their ids: sorted, without repetition.
    """

    def __init__(self, alphabet: str) -> None:
        if not isinstance(alphabet, str) or list(alphabet) != sorted(set(alphabet)):
            raise ValueError("the alphabet is not sorted")
        super().__init__([character.encode() for character in (*alphabet, "\ufffd")])
        self._alphabet = alphabet
        self._code_points = _code_points(alphabet)

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: (N,) of the tokenizer's dtype, one for each character."""
        code_points = _code_points(text)
        ids = np.searchsorted(self._code_points, code_points)
        known = np.append(self._code_points, -1)[ids] == code_points
        return np.where(known, ids, self.vocabulary_size - 1).astype(self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The kind of tokenizer and the alphabet."""
        return {"kind": TokenizerKind.char.name, "alphabet": self._alphabet}


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), "<u4").astype(np.int64)


class BPETokenizer(Tokenizer):
    """A token is a sequence of bytes that is frequent in the training text; every byte is a token, too.

    Args:
        model: the tokenizer as the tokenizers library describes it. Only its vocabulary and merges are used: the rest
            is the same for each tokenizer that was trained here, and cannot be trusted in others.

    Raises:
        ValueError: the library does not accept the description, or ids or the tokens of some bytes are missing.
    """

    def __init__(self, model: dict[str, Any]) -> None:
        library = _library()
        description = json.loads(_untrained(library).to_str())
        description["model"] |= {key: model["model"][key] for key in ("vocab", "merges")}
        try:
            self._library_tokenizer = library.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises nothing more precise
            raise ValueError(str(error)) from error
        vocabulary = self._library_tokenizer.get_vocab()
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        bytes_of = {character: byte for byte, character in enumerate(_byte_characters())}
        if [vocabulary[token] for token in tokens] != list(range(len(tokens))) or not set(bytes_of) <= set(vocabulary):
            raise ValueError("its vocabulary lacks ids or bytes")
        super().__init__([bytes(bytes_of[character] for character in token) for token in tokens])
        self._model = model

    def encode(self, text: str) -> np.ndarray:
        """The ids of a text: (N,) of the tokenizer's dtype."""
        return next(self.encode_blocks([text]))

    def encode_blocks(self, blocks: Iterable[str]) -> Iterator[np.ndarray]:
        """The ids of each block, which is encoded separately: (N,) of the tokenizer's dtype."""
        remaining = iter(blocks)
        while batch := list(itertools.islice(remaining, BLOCKS_AT_ONCE)):
            for encoding in self._library_tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, self.dtype)

    def to_json(self) -> dict[str, Any]:
        """The kind of tokenizer and the library's description."""
        return {"kind": TokenizerKind.bpe.name, "model": self._model}


def _library() -> Any:
    """Imports the tokenizers library, which takes longer than all other imports here."""
    # One core unless the user asks for more: ranks share the host, and a fork after parallel use prints a warning.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import tokenizers

    return tokenizers


def _byte_characters() -> str:
    """The character for each byte in the library's vocabulary: the byte's own character if it is printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = itertools.count(0x100)
    return "".join(chr(byte if byte in printable else next(others)) for byte in range(256))


def train(kind: TokenizerKind, texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """Trains a tokenizer on texts; the same texts give the same tokenizer. tokenizer=byte does not read them.

    Args:
        kind: the kind of tokenizer.
        texts: the texts, which are read once and in order.
        vocabulary_size: number of tokens for bpe, which learns fewer from a short text; see check_size().
    """
    if kind is TokenizerKind.byte:
        return ByteTokenizer()
    if kind is TokenizerKind.char:
        return CharTokenizer("".join(sorted(set[str]().union(*map(set, texts)))))
    return _train_bpe(texts, vocabulary_size)


def check_size(kind: TokenizerKind, vocabulary_size: int, key: str) -> None:
    """Checks the configured size of the vocabulary.

    Args:
        kind: the kind of tokenizer; only bpe has a configurable size.
        vocabulary_size: number of tokens.
        key: the configuration key of the size, for the message.

    Raises:
        ConfigError: bpe does not support this size.
    """
    if kind is TokenizerKind.bpe and not SMALLEST_BPE <= vocabulary_size <= LARGEST_BPE:
        raise ConfigError(
            [
                f"{key}={vocabulary_size}: must be {SMALLEST_BPE} (the bytes and one pair) to {LARGEST_BPE} with "
                "tokenizer=bpe; 1024 is usual for a small model, or use tokenizer=byte"
            ]
        )


def _train_bpe(texts: Iterable[str], vocabulary_size: int) -> BPETokenizer:
    library = _library()
    tokenizer = _untrained(library)
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocabulary_size, initial_alphabet=list(_byte_characters()), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return BPETokenizer(json.loads(tokenizer.to_str()))


def _untrained(library: Any) -> Any:
    """An untrained tokenizer of the library."""
    tokenizer = library.Tokenizer(library.models.BPE())
    # Words as in GPT-2: a space belongs to the word after it.
    words = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    short = library.pre_tokenizers.FixedLength(MAX_WORD_BYTES)
    tokenizer.pre_tokenizer = library.pre_tokenizers.Sequence([words, short])
    return tokenizer


def from_json(description: Any) -> Tokenizer:
    """The tokenizer of a description by to_json().

    Raises:
        ValueError: the description is invalid.
    """
    try:
        kind = TokenizerKind[description["kind"]]
        if kind is TokenizerKind.byte:
            return ByteTokenizer()
        if kind is TokenizerKind.char:
            return CharTokenizer(description["alphabet"])
        return BPETokenizer(description["model"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"no tokenizer: {error!r}") from error


class Stream:
    """Converts ids to text one by one; returns a character once all its bytes have arrived."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._pieces = tokenizer.pieces
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> str:
        """The characters that the id completes; may be empty."""
        return self._decoder.decode(self._pieces[token])

    def rest(self) -> str:
        """The remaining text at the end: U+FFFD for an incomplete character, else empty."""
        return self._decoder.decode(b"", final=True)
