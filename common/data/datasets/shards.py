"""Datasets that do not fit in memory: shards of raw arrays in a folder, which are memory-mapped when needed.

docs/data.md describes the format.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from common import file_io
from common.config.schema import ImageShardsConfig, TextShardsConfig, Verify
from common.data.datasets import tokenizer as tokenizers
from common.data.datasets.fingerprint import little_endian
from common.data.datasets.split import ImageDataset
from common.data.datasets.text import PARTS, Corpus, Windows
from common.data.datasets.tokenizer import Tokenizer
from common.errors import ConfigError

import numpy as np

VERSION = 1
INDEX = "index.json"
FIELDS = {"images": ("images", "classes"), "text": ("tokens",)}  # the fields of each kind of dataset
USE = {"images": "data=image_shards", "text": "data=text_shards"}
DTYPES = {"images": ("|u1",), "classes": ("|u1",), "tokens": ("|u1", "<u2", "<u4")}
ITEM_SHAPES: dict[str, tuple[int, ...]] = {"images": (28, 28), "classes": (), "tokens": ()}
MAX_MAPS = 128  # limit of memory maps per field, because each keeps a file open
MAX_PROBLEMS = 5  # limit of problems that a rank names
NUM_CLASSES = 10
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # cannot lead out of the folder
_MOST = 1 << 48  # limit of items and bytes, so that sums and products fit into 64 bits


@dataclass(frozen=True)
class Shard:
    """A file with items of one field.

    Attributes:
        file: its name in the folder.
        count: number of items.
        sha256: SHA-256 of the file, in hexadecimal.
    """

    file: str
    count: int
    sha256: str


@dataclass(frozen=True)
class Field:
    """An array cut into shards with equal numbers of items, except for the last one.

    Attributes:
        dtype: the dtype in numpy's notation, little-endian.
        item_shape: the shape of one item.
        count: number of items.
        sha256: SHA-256 of the bytes of all items, in hexadecimal; does not depend on the size of the shards.
        shards: the shards, in the order of their items.
    """

    dtype: str
    item_shape: tuple[int, ...]
    count: int
    sha256: str
    shards: tuple[Shard, ...]

    @property
    def item_bytes(self) -> int:
        """Size of one item in bytes."""
        return int(np.dtype((self.dtype, self.item_shape)).itemsize)


@dataclass(frozen=True)
class Part:
    """The training or the test part of a dataset.

    Attributes:
        num_bytes: number of UTF-8 bytes of the text; 0 for images.
        fields: the fields, by name.
    """

    num_bytes: int
    fields: dict[str, Field]


@dataclass(frozen=True)
class Index:
    """The contents of index.json, which describes a folder of shards.

    Attributes:
        folder: the folder.
        kind: "images" or "text".
        tokenizer: the tokenizer of the text; None for images.
        parts: the parts, by their names in PARTS.
    """

    folder: Path
    kind: str
    tokenizer: Tokenizer | None
    parts: dict[str, Part]

    @property
    def limits(self) -> dict[str, int]:
        """For fields whose items are indices of a model's outputs or rows: the bound that all items must be below."""
        return {"tokens": self.tokenizer.vocabulary_size} if self.tokenizer else {"classes": NUM_CLASSES}

    def shards(self) -> list[tuple[Field, Shard]]:
        """All shards, each with its field."""
        fields = [field for part in self.parts.values() for field in part.fields.values()]
        return [(field, shard) for field in fields for shard in field.shards]


class ShardedArray:
    """A field of a dataset as an array; a shard is memory-mapped when its items are needed.

    Args:
        folder: the folder of the shards.
        field: the description of the field in the index.
        limit: bound that all items must be below; None: no bound.
    """

    def __init__(self, folder: Path, field: Field, limit: int | None = None) -> None:
        self._folder, self._field, self._limit = folder, field, limit
        self._shard_size = field.shards[0].count
        self._map = lru_cache(MAX_MAPS)(self._open_map)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, ...)."""
        return self._field.count, *self._field.item_shape

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the items."""
        return np.dtype(self._field.dtype)

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of all items, in hexadecimal, from the index."""
        return self._field.sha256

    def __len__(self) -> int:
        return self._field.count

    def __getitem__(self, items: np.ndarray | slice, /) -> np.ndarray:
        """A copy of the chosen items: (len(slice), ...) or (*items.shape, ...).

        Args:
            items: a slice, or integers of any shape; negative ones count from the end.

        Raises:
            IndexError: a number is out of range or not an integer.
            ConfigError: a shard is missing or its size differs from the index, or an item is not below the limit.
        """
        if not isinstance(items, slice):
            return self._within_limit(self._gather(np.asarray(items)))
        start, stop, step = items.indices(len(self))
        is_run = step == 1
        chosen = self._run(start, max(start, stop)) if is_run else self._gather(np.arange(start, stop, step))
        return self._within_limit(chosen)

    def _within_limit(self, items: np.ndarray) -> np.ndarray:
        """Returns the items; raises a ConfigError if one of them is not below the limit."""
        if self._limit is not None and items.size and items.max() >= self._limit:
            place = f"data.path={self._folder}: {self._field.shards[0].file} or a shard after it"
            raise ConfigError([f"{place} has the number {items.max()}, and all must be below {self._limit}; {_REMEDY}"])
        return items

    def _run(self, start: int, stop: int) -> np.ndarray:
        """The items start .. stop - 1."""
        touched = range(start // self._shard_size, -(-stop // self._shard_size) if stop > start else 0)
        for number in touched:  # before memory is allocated for the size in the index
            self._check_size(number)
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for number in touched:
            base = number * self._shard_size
            first, last = max(start, base), min(stop, base + self._shard_size)
            result[first - start : last - start] = self._map(number)[first - base : last - base]
        return result

    def _gather(self, items: np.ndarray) -> np.ndarray:
        """The items with these numbers, shard by shard."""
        numbers = items.ravel()
        if numbers.size and numbers.dtype.kind not in "iu":
            raise IndexError(f"items of the dtype {numbers.dtype} choose nothing; they must be integers")
        numbers = numbers.astype(np.int64)
        numbers[numbers < 0] += len(self)
        if numbers.size and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"items must be within {len(self)}, and are {items.min()} to {items.max()}")
        shards, places = np.divmod(numbers, self._shard_size)
        order = np.argsort(shards, kind="stable")
        touched, starts = np.unique(shards[order], return_index=True)
        result = np.empty((len(numbers), *self.shape[1:]), self.dtype)
        for shard, chosen in zip(touched, np.split(order, starts[1:]), strict=False):  # no numbers: one empty array
            result[chosen] = self._map(int(shard))[places[chosen]]
        return result.reshape((*items.shape, *self.shape[1:]))

    def _check_size(self, number: int) -> None:
        problem = _problem(self._folder, self._field, self._field.shards[number], Verify.size)
        if problem:
            raise ConfigError([problem])

    def _open_map(self, number: int) -> np.ndarray:
        self._check_size(number)
        shard = self._field.shards[number]
        with _open_shard(self._folder, shard) as file:
            return np.memmap(file, self.dtype, mode="r", shape=(shard.count, *self._field.item_shape))


def open_index(path: str | None, kind: str) -> Index:
    """Reads and checks the index of a dataset, but not the shards.

    Args:
        path: the folder; None raises a ConfigError.
        kind: the kind of dataset that the caller needs, "images" or "text".

    Raises:
        ConfigError: there is no index, it is damaged, or the dataset is of another kind.
    """
    if path is None:
        raise ConfigError(
            ["data.path=null: must name the folder that python -m recipes shard-data has written; set data.path"]
        )
    try:
        content = file_io.parse_json(file_io.read_bytes(Path(path) / INDEX))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            [
                f"data.path={path}: there is no {INDEX}; name a folder that python -m recipes shard-data has written "
                "to its end"
            ]
        ) from error
    except OSError as error:
        raise _unusable(path, f"cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise _unusable(path, f"is not JSON ({error})") from error
    reason = _refusal(content)
    if reason:
        raise _unusable(path, reason)
    try:
        index = _parse(Path(path), content)
    except KeyError as error:
        raise _unusable(path, f"lacks the key {error}") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise _unusable(path, f"cannot be understood ({error})") from error
    if index.kind != kind:
        raise ConfigError(
            [
                f"data.path={path}: holds {index.kind}, which go with {USE[index.kind]}; name a folder of {kind}, or "
                f"write one with python -m recipes shard-data source={'idx' if kind == 'images' else 'text'}"
            ]
        )
    return index


_REMEDY = "copy the folder again, or write it again with python -m recipes shard-data"


def _unusable(path: str, reason: str) -> ConfigError:
    return ConfigError([f"data.path={path}: {INDEX} {file_io.brief(reason)}; {_REMEDY}"])


def _refusal(content: Any) -> str | None:
    """Why an index is refused before it is parsed; None if it is not."""
    if not isinstance(content, dict) or "version" not in content:
        return "lacks the key 'version'"
    if content["version"] != VERSION:
        return f"has version {content['version']} of the format, and this program reads version {VERSION}"
    if content.get("sha256") != _content_sha256(content):
        return "was changed after it was written: it does not have the SHA-256 that it names"
    return None


def _content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of an index without its SHA-256."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _parse(folder: Path, content: dict[str, Any]) -> Index:
    """The index as dataclasses.

    Raises:
        KeyError: a key is missing.
        TypeError, ValueError, AttributeError: a value is invalid.
    """
    kind = content["kind"]
    if kind not in FIELDS:
        raise ValueError(f"kind is {kind!r}, which must be {' or '.join(FIELDS)}")
    parts = {name: _parse_part(content["parts"][name], kind) for name in PARTS}
    tokenizer = tokenizers.from_json(content["tokenizer"]) if kind == "text" else None
    for name, part in parts.items():
        counts = {name: field.count for name, field in part.fields.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the {name} part has {' and '.join(f'{n} {field}' for field, n in counts.items())}")
        if tokenizer and part.fields["tokens"].dtype != little_endian(tokenizer.dtype).str:
            raise ValueError(f"tokens must be {little_endian(tokenizer.dtype).str}, as the tokenizer's are")
    return Index(folder, kind, tokenizer, parts)


def _parse_part(content: dict[str, Any], kind: str) -> Part:
    fields = {name: _parse_field(name, content["fields"][name]) for name in FIELDS[kind]}
    return Part(_count(content["num_bytes"]) if kind == "text" else 0, fields)


def _parse_field(name: str, content: dict[str, Any]) -> Field:
    shards = tuple(_parse_shard(name, one) for one in content["shards"])
    dtype, item_shape = content["dtype"], content["item_shape"]
    if dtype not in DTYPES[name] or item_shape != list(ITEM_SHAPES[name]):
        raise ValueError(f"{name} are {dtype} of the shape {item_shape}")
    field = Field(dtype, ITEM_SHAPES[name], _count(content["count"]), str(content["sha256"]), shards)
    counts = [shard.count for shard in shards]
    if not counts or sum(counts) != field.count or {*counts[:-1], max(counts)} != {counts[0]}:
        raise ValueError(f"the shards of {name} have {counts[:9]} items, of {field.count} together")
    return field


def _parse_shard(name: str, content: dict[str, Any]) -> Shard:
    shard = Shard(str(content["file"]), _count(content["count"]), str(content["sha256"]))
    if not _FILE_NAME.fullmatch(shard.file):
        raise ValueError(f"the shards of {name} are not within the folder")
    return shard


def _count(value: Any) -> int:
    """Returns a number of items or bytes; raises a ValueError unless it is an integer of at least 1."""
    if type(value) is not int or not 1 <= value < _MOST:
        raise ValueError(f"{value!r} is no number of items or bytes")
    return value


def verify(index: Index, how: Verify, local_rank: int = 0, local_size: int = 1) -> None:
    """Checks this rank's part of the shards, which are divided among the ranks of a host.

    Raises:
        ConfigError: shards are missing or damaged, or belong to another index.
    """
    if how is Verify.off:
        return
    mine = index.shards()[local_rank::local_size]
    problems = [problem for field, shard in mine if (problem := _problem(index.folder, field, shard, how))]
    if len(problems) > MAX_PROBLEMS:
        more = f"data.path={index.folder}: {len(problems) - MAX_PROBLEMS} more shards of {len(mine)} are like this"
        problems = [*problems[:MAX_PROBLEMS], more]
    if problems:
        raise ConfigError(problems)


def _problem(folder: Path, field: Field, shard: Shard, how: Verify) -> str | None:
    """The problem of a shard; None if it is sound."""
    expected = shard.count * field.item_bytes
    try:
        with _open_shard(folder, shard) as file:
            size = os.fstat(file.fileno()).st_size
            if size != expected:
                reason = f"has {size} bytes instead of {expected}"
            elif how is Verify.hash and file_io.sha256(file) != shard.sha256:
                reason = f"has other contents than the SHA-256 in {INDEX}"
            else:
                return None
    except FileNotFoundError:
        return f"data.path={folder}: {shard.file} is missing; {_REMEDY}"
    except OSError as error:
        return f"data.path={folder}: {shard.file} cannot be read ({error.strerror}); {_REMEDY}"
    return f"data.path={folder}: {shard.file} {reason}: it is damaged, or {INDEX} belongs to other shards; {_REMEDY}"


def _open_shard(folder: Path, shard: Shard) -> BufferedReader:
    """Opens a shard, which must be inside the folder even if its name is a symbolic link.

    Raises:
        OSError: it is outside the folder or cannot be opened; see file_io.open_regular().
    """
    path = folder / shard.file
    if os.path.dirname(os.path.realpath(path)) != os.path.realpath(folder):
        raise OSError(errno.EXDEV, "is a link that leads out of the folder", str(path))
    return file_io.open_regular(path)


def load_images(cfg: ImageShardsConfig) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test set of sharded images; reads only the index.

    Raises:
        ConfigError: there is no such dataset, or its index is damaged.
    """
    index = open_index(cfg.path, "images")
    train, test = (ImageDataset(**_arrays(index, part)) for part in PARTS)
    return train, test


def load_text(cfg: TextShardsConfig, context: int) -> Corpus:
    """Sharded text in examples of `context` tokens; reads only the index.

    Raises:
        ConfigError: there is no such dataset, its index is damaged, or the text is too short for one example.
    """
    index = open_index(cfg.path, "text")
    train, test = (Windows.of(_arrays(index, part)["tokens"], context, index.parts[part].num_bytes) for part in PARTS)
    if index.tokenizer is None:
        raise TypeError("images have no tokenizer")
    return Corpus(train, test, index.tokenizer).check(f"data.path={cfg.path}")


def _arrays(index: Index, part: str) -> dict[str, ShardedArray]:
    fields = index.parts[part].fields
    return {name: ShardedArray(index.folder, field, index.limits.get(name)) for name, field in fields.items()}


@dataclass
class _OpenField:
    """A field that is being written."""

    dtype: np.dtype
    item_shape: tuple[int, ...]
    sha256: Any = field(default_factory=hashlib.sha256)
    shards: list[Shard] = field(default_factory=list)
    file: BinaryIO | None = None  # the file of the last shard while it is not full
    shard_sha256: Any = None
    shard_count: int = 0


class ShardWriter:
    """Writes a dataset as shards; each item is written directly into its file.

    Everything is written into a hidden folder next to the target, which is renamed to the target when all is on the
    disk; so an attempt that ends early leaves nothing at the target. Hidden folders of killed attempts on this host are
    removed.

    Args:
        out: the target folder; it must be empty or not exist.
        shard_bytes: size of a shard in bytes; a shard has at least one item.

    Raises:
        ConfigError: the target is not an empty folder, or shard_bytes is less than 1.
    """

    def __init__(self, out: str, shard_bytes: int) -> None:
        self._out = Path(os.path.abspath(out))
        self._shard_bytes = shard_bytes
        self._host = socket.gethostname()
        self._folder = self._out.parent / f".{self._out.name}.{self._host}.{os.getpid()}.unfinished"
        self._fields: dict[tuple[str, str], _OpenField] = {}
        if shard_bytes < 1:
            raise ConfigError([f"shard_bytes={shard_bytes}: must be at least 1; 67108864 (64 MiB) is usual"])
        if self._out.exists() and not (self._out.is_dir() and not any(self._out.iterdir())):
            raise _taken(out)

    def __enter__(self) -> "ShardWriter":
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._folder.mkdir()
        return self

    def _remove_leftovers(self) -> None:
        """Removes the folders of ended processes on this host, and of earlier processes with this process's id."""
        start, end = f".{self._out.name}.{self._host}.", ".unfinished"
        for path in self._out.parent.iterdir():
            process = path.name.removeprefix(start).removesuffix(end)
            if path.name == f"{start}{process}{end}" and process.isdigit() and not _runs(int(process)):
                shutil.rmtree(path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._fields.values():
            if one.file is not None:
                one.file.close()
        shutil.rmtree(self._folder, ignore_errors=True)  # does not exist any more if it was renamed to the target

    def add(self, part: str, name: str, items: np.ndarray) -> None:
        """Appends items to a field.

        Args:
            part: "train" or "test".
            name: the name of the field.
            items: (n, ...), with the same dtype and item shape in each call.
        """
        dtype = little_endian(items.dtype)
        one = self._fields.setdefault((part, name), _OpenField(dtype, items.shape[1:]))
        if (dtype, items.shape[1:]) != (one.dtype, one.item_shape):
            raise ValueError(f"{name} were {one.dtype} of {one.item_shape}, now {dtype} of {items.shape[1:]}")
        shard_size = max(1, self._shard_bytes // np.dtype((dtype, one.item_shape)).itemsize)
        while len(items):
            if one.file is None:
                one.file = (self._folder / f"{part}-{name}-{len(one.shards):05}.bin").open("wb")
                one.shard_sha256, one.shard_count = hashlib.sha256(), 0
            now, items = np.split(items, [shard_size - one.shard_count])
            content = np.ascontiguousarray(now, dtype).data
            one.file.write(content)
            one.sha256.update(content)
            one.shard_sha256.update(content)
            one.shard_count += len(now)
            if one.shard_count == shard_size:
                _close_shard(one)

    def finish(
        self, kind: str, num_bytes: Mapping[str, int] | None = None, tokenizer: Tokenizer | None = None
    ) -> Index:
        """Writes the index and renames the folder to the target.

        Args:
            kind: "images" or "text".
            num_bytes: for text: the number of UTF-8 bytes of each part.
            tokenizer: for text: its tokenizer.

        Raises:
            ConfigError: the target exists by now and is not empty.
        """
        parts = {part: Part((num_bytes or {}).get(part, 0), self._closed_fields(part, FIELDS[kind])) for part in PARTS}
        content: dict[str, Any] = {"version": VERSION, "kind": kind}
        content["tokenizer"] = tokenizer.to_json() if tokenizer else None
        content["parts"] = {name: asdict(part) for name, part in parts.items()}
        content["sha256"] = _content_sha256(content)
        with (self._folder / INDEX).open("wb") as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
            file_io.sync(file)
        file_io.sync_path(self._folder)
        try:
            self._folder.rename(self._out)
        except OSError as error:
            raise _taken(str(self._out)) from error
        file_io.sync_path(self._out.parent)
        return Index(self._out, kind, tokenizer, parts)

    def _closed_fields(self, part: str, names: Sequence[str]) -> dict[str, Field]:
        fields = {}
        for name in names:
            one = self._fields[part, name]
            if one.file is not None:
                _close_shard(one)
            count = sum(shard.count for shard in one.shards)
            fields[name] = Field(one.dtype.str, one.item_shape, count, one.sha256.hexdigest(), tuple(one.shards))
        return fields


def _taken(out: str) -> ConfigError:
    return ConfigError(
        [f"out={out}: exists and is no empty folder, and is never overwritten; choose another, or remove it"]
    )


def _close_shard(one: _OpenField) -> None:
    if one.file is None:
        return
    file_io.sync(one.file)
    one.file.close()
    one.shards.append(Shard(Path(one.file.name).name, one.shard_count, one.shard_sha256.hexdigest()))
    one.file = None


def _runs(process: int) -> bool:
    """Whether another process with this id is running."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # a process of another user, or an invalid id
        return True
    return True
