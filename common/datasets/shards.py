"""Datasets that do not fit in memory: shards of raw arrays in a folder, mapped into memory as they are needed.

docs/data.md describes the format.
"""

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from common import disk
from common.config import ConfigError, ImageShardsConfig, TextShardsConfig, Verify
from common.datasets import tokenizer as tokenizers
from common.datasets.fingerprint import little_endian
from common.datasets.split import Split
from common.datasets.text import PARTS, Corpus, Windows
from common.datasets.tokenizer import Tokenizer

import numpy as np

VERSION = 1
INDEX = "index.json"
FIELDS = {"images": ("images", "classes"), "text": ("tokens",)}  # of each kind of dataset
USE = {"images": "data=image_shards", "text": "data=text_shards"}
DTYPES = {"images": ("|u1",), "classes": ("|u1",), "tokens": ("|u1", "<u2", "<u4")}
ITEM_SHAPES: dict[str, tuple[int, ...]] = {"images": (28, 28), "classes": (), "tokens": ()}
MAX_MAPS = 128  # open at a time of one field, as each keeps a file open
MAX_PROBLEMS = 5  # named by a rank


@dataclass(frozen=True)
class Shard:
    """A file of one field's items.

    Attributes:
        file: its name within the folder.
        count: number of items.
        sha256: of its bytes, in hexadecimal.
    """

    file: str
    count: int
    sha256: str


@dataclass(frozen=True)
class Field:
    """An array cut into shards, which have as many items each, but for the last one.

    Attributes:
        dtype: as numpy writes it, little-endian.
        item_shape: of one item.
        count: number of items.
        sha256: of all items' bytes, in hexadecimal; does not depend on the size of the shards.
        shards: in the order of their items.
    """

    dtype: str
    item_shape: tuple[int, ...]
    count: int
    sha256: str
    shards: tuple[Shard, ...]

    @property
    def item_bytes(self) -> int:
        """Size of one item."""
        return int(np.dtype((self.dtype, self.item_shape)).itemsize)


@dataclass(frozen=True)
class Part:
    """The training or the test part of a dataset.

    Attributes:
        num_bytes: of text, in UTF-8; 0 for images.
        fields: by name.
    """

    num_bytes: int
    fields: dict[str, Field]


@dataclass(frozen=True)
class Index:
    """What index.json says of a folder of shards.

    Attributes:
        folder: where it is.
        kind: "images" or "text".
        tokenizer: of text, as common.datasets.tokenizer describes it; None for images.
        parts: by name, PARTS.
    """

    folder: Path
    kind: str
    tokenizer: dict[str, Any] | None
    parts: dict[str, Part]

    def shards(self) -> list[tuple[Field, Shard]]:
        """All shards, each with the field that it is part of."""
        fields = [field for part in self.parts.values() for field in part.fields.values()]
        return [(field, shard) for field in fields for shard in field.shards]


class ShardedArray:
    """A field of a dataset as an array; only shards that are asked for are mapped into memory.

    Args:
        folder: of the shards.
        field: what the index says.
    """

    def __init__(self, folder: Path, field: Field) -> None:
        self._folder, self._field = folder, field
        self._shard_size = field.shards[0].count
        self._map = lru_cache(MAX_MAPS)(self._open_map)

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        return self._field.count, *self._field.item_shape

    @property
    def dtype(self) -> np.dtype:
        """Of the items."""
        return np.dtype(self._field.dtype)

    @property
    def sha256(self) -> str:
        """Of all items' bytes, in hexadecimal, as the index says."""
        return self._field.sha256

    def __len__(self) -> int:
        return self._field.count

    def __getitem__(self, items: np.ndarray | slice, /) -> np.ndarray:
        """A copy of the chosen items: (len(slice), ...) or (*items.shape, ...).

        Args:
            items: a slice, or integers of any shape; negative ones count from the end.

        Raises:
            IndexError: a number is out of range, or no integer.
            ConfigError: a shard is missing or has another size than the index says.
        """
        if not isinstance(items, slice):
            return self._gather(np.asarray(items))
        start, stop, step = items.indices(len(self))
        return self._run(start, max(start, stop)) if step == 1 else self._gather(np.arange(start, stop, step))

    def _run(self, start: int, stop: int) -> np.ndarray:
        """The items start .. stop - 1."""
        result = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for number in range(start // self._shard_size, -(-stop // self._shard_size) if stop > start else 0):
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
        for shard, chosen in zip(touched, np.split(order, starts[1:]), strict=False):  # no number: one empty choice
            result[chosen] = self._map(int(shard))[places[chosen]]
        return result.reshape((*items.shape, *self.shape[1:]))

    def _open_map(self, number: int) -> np.ndarray:
        shard = self._field.shards[number]
        problem = _problem(self._folder, self._field, shard, Verify.size)
        if problem:
            raise ConfigError([problem])
        shape = (shard.count, *self._field.item_shape)
        return np.memmap(self._folder / shard.file, self.dtype, mode="r", shape=shape)


def open_index(path: str | None, kind: str) -> Index:
    """Reads and checks the index of a dataset, not the shards.

    Args:
        path: the folder; None is refused with a message.
        kind: what the caller can use, "images" or "text".

    Raises:
        ConfigError: there is no index, it is damaged, or it is of a dataset of another kind.
    """
    if path is None:
        raise ConfigError(
            ["data.path=null: must name the folder that python -m recipes shard-data has written; set data.path"]
        )
    try:
        content = json.loads((Path(path) / INDEX).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigError(
            [
                f"data.path={path}: there is no {INDEX}; name a folder that python -m recipes shard-data has written "
                "to its end"
            ]
        ) from error
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


def _unusable(path: str, reason: str) -> ConfigError:
    return ConfigError(
        [
            f"data.path={path}: {INDEX} {reason}; copy the folder again, or write it again with python -m recipes "
            "shard-data"
        ]
    )


def _refusal(content: Any) -> str | None:
    """Why an index is not even parsed."""
    if not isinstance(content, dict) or "version" not in content:
        return "lacks the key 'version'"
    if content["version"] != VERSION:
        return f"has version {content['version']} of the format, and this program reads version {VERSION}"
    if content.get("sha256") != _content_sha256(content):
        return "was changed after it was written: it does not have the SHA-256 that it names"
    return None


def _content_sha256(content: Mapping[str, Any]) -> str:
    """SHA-256 of all that an index says beside its own SHA-256."""
    others = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()


def _parse(folder: Path, content: dict[str, Any]) -> Index:
    """The index as dataclasses.

    Raises:
        KeyError: a key is missing.
        TypeError, ValueError, AttributeError: a value is not what it must be.
    """
    kind = content["kind"]
    if kind not in FIELDS:
        raise ValueError(f"kind is {kind!r}, which must be {' or '.join(FIELDS)}")
    parts = {name: _parse_part(content["parts"][name], kind) for name in PARTS}
    index = Index(folder, kind, content["tokenizer"] if kind == "text" else None, parts)
    for name, part in parts.items():
        counts = {name: field.count for name, field in part.fields.items()}
        if len(set(counts.values())) > 1:
            raise ValueError(f"the {name} part has {' and '.join(f'{n} {field}' for field, n in counts.items())}")
    if kind == "text":
        dtype = little_endian(tokenizers.from_json(content["tokenizer"]).dtype).str
        if any(part.fields["tokens"].dtype != dtype for part in parts.values()):
            raise ValueError(f"tokens must be {dtype}, as the tokenizer's are")
    return index


def _parse_part(content: dict[str, Any], kind: str) -> Part:
    fields = {name: _parse_field(name, content["fields"][name]) for name in FIELDS[kind]}
    return Part(int(content["num_bytes"]) if kind == "text" else 0, fields)


def _parse_field(name: str, content: dict[str, Any]) -> Field:
    shards = tuple(Shard(str(one["file"]), int(one["count"]), str(one["sha256"])) for one in content["shards"])
    item_shape = tuple(content["item_shape"])
    field = Field(content["dtype"], item_shape, content["count"], str(content["sha256"]), shards)
    if field.dtype not in DTYPES[name] or item_shape != ITEM_SHAPES[name]:
        raise ValueError(f"{name} are {field.dtype} of the shape {list(item_shape)}")
    counts = [shard.count for shard in shards]
    if not counts or min(counts) < 1 or sum(counts) != field.count or {*counts[:-1], max(counts)} != {counts[0]}:
        raise ValueError(f"the shards of {name} have {counts[:9]} items, of {field.count} together")
    if any(Path(shard.file).name != shard.file for shard in shards):
        raise ValueError(f"the shards of {name} are not within the folder")
    return field


def verify(index: Index, how: Verify, local_rank: int = 0, local_size: int = 1) -> None:
    """Checks this rank's share of the shards; the ranks of a host share them out.

    Raises:
        ConfigError: shards are missing or damaged, or are others than the index's.
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
    """What is wrong with a shard."""
    path, expected = folder / shard.file, shard.count * field.item_bytes
    remedy = "copy the folder again, or write it again with python -m recipes shard-data"
    try:
        size = path.stat().st_size
        if size != expected:
            reason = f"has {size} bytes instead of {expected}"
        elif how is Verify.hash and _file_sha256(path) != shard.sha256:
            reason = f"has other contents than the SHA-256 in {INDEX}"
        else:
            return None
    except FileNotFoundError:
        return f"data.path={folder}: {shard.file} is missing; {remedy}"
    except OSError as error:
        return f"data.path={folder}: {shard.file} cannot be read ({error.strerror}); {remedy}"
    return f"data.path={folder}: {shard.file} {reason}: it is damaged, or {INDEX} belongs to other shards; {remedy}"


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_images(cfg: ImageShardsConfig) -> tuple[Split, Split]:
    """The training and the test split of sharded images; reads the index only.

    Raises:
        ConfigError: there is no such dataset, or its index is damaged.
    """
    index = open_index(cfg.path, "images")
    splits = [{name: ShardedArray(index.folder, field) for name, field in _fields(index, part)} for part in PARTS]
    train, test = (Split(**arrays) for arrays in splits)
    return train, test


def load_text(cfg: TextShardsConfig, context: int) -> Corpus:
    """Sharded text in examples of `context` tokens; reads the index only.

    Raises:
        ConfigError: there is no such dataset, its index is damaged, or it is too short for one example.
    """
    index = open_index(cfg.path, "text")
    arrays = {part: ShardedArray(index.folder, field) for part in PARTS for _, field in _fields(index, part)}
    train, test = (Windows.of(arrays[part], context, index.parts[part].num_bytes) for part in PARTS)
    return Corpus(train, test, tokenizers.from_json(index.tokenizer or {})).check(f"data.path={cfg.path}")


def _fields(index: Index, part: str) -> Iterator[tuple[str, Field]]:
    yield from index.parts[part].fields.items()


@dataclass
class _OpenField:
    """A field that is being written."""

    dtype: np.dtype
    item_shape: tuple[int, ...]
    sha256: Any = field(default_factory=hashlib.sha256)
    shards: list[Shard] = field(default_factory=list)
    file: BinaryIO | None = None  # of the last shard, while it takes more items
    shard_sha256: Any = None
    shard_count: int = 0


class ShardWriter:
    """Writes a dataset as shards, each item straight into its file.

    All is written into a hidden folder beside the target, which takes the target's name when all is on the disk; so
    an attempt that ends early leaves nothing at the target. What attempts of this host that were killed have left
    beside it is removed.

    Args:
        out: the folder to be; it must not exist, or be empty.
        shard_bytes: size of a shard, which has one item at least.

    Raises:
        ConfigError: the folder holds something.
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

    def __enter__(self) -> Self:
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._remove_leftovers()
        self._folder.mkdir()
        return self

    def _remove_leftovers(self) -> None:
        """Removes the folders of processes of this host that are gone, or had the number of this one."""
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
        shutil.rmtree(self._folder, ignore_errors=True)  # gone when it has become the target

    def add(self, part: str, name: str, items: np.ndarray) -> None:
        """Appends items to a field.

        Args:
            part: "train" or "test".
            name: of the field.
            items: (n, ...), of the same dtype and item shape for each call.
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
        """Writes the index and gives the folder its name.

        Args:
            kind: "images" or "text".
            num_bytes: of text: bytes of each part.
            tokenizer: of text.

        Raises:
            ConfigError: something has come to be at the target meanwhile.
        """
        parts = {part: Part((num_bytes or {}).get(part, 0), self._closed_fields(part, FIELDS[kind])) for part in PARTS}
        content: dict[str, Any] = {"version": VERSION, "kind": kind}
        content["tokenizer"] = tokenizer.to_json() if tokenizer else None
        content["parts"] = {name: asdict(part) for name, part in parts.items()}
        content["sha256"] = _content_sha256(content)
        with (self._folder / INDEX).open("wb") as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
            disk.sync(file)
        disk.sync_path(self._folder)
        try:
            self._folder.rename(self._out)
        except OSError as error:
            raise _taken(str(self._out)) from error
        disk.sync_path(self._out.parent)
        return Index(self._out, kind, content["tokenizer"], parts)

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
    disk.sync(one.file)
    one.file.close()
    one.shards.append(Shard(Path(one.file.name).name, one.shard_count, one.shard_sha256.hexdigest()))
    one.file = None


def _runs(process: int) -> bool:
    """Whether there is another process of this number."""
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # someone else's, or no number of a process
        return True
    return True
