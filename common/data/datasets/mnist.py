"""MNIST in its four IDX files, gzipped or not, from a folder or downloaded into the user's cache.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998, http://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from common import file_io
from common.data.datasets.split import ImageDataset
from common.errors import ConfigError

import numpy as np

# File -> SHA-256 of its gzipped form.
FILES = {
    "train-images-idx3-ubyte": "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
    "train-labels-idx1-ubyte": "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
    "t10k-images-idx3-ubyte": "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
    "t10k-labels-idx1-ubyte": "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
}
MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://yann.lecun.com/exdb/mnist/",
)
CONNECT_SECONDS = 10


def cache_folder() -> Path:
    """The folder for downloaded files."""
    import pooch

    return Path(pooch.os_cache("horovod-recipes")) / "mnist"


def fetch(folder: Path) -> None:
    """Downloads the files that are missing in the folder; tries each mirror in turn.

    Raises:
        ConfigError: no mirror gave a file with the right SHA-256.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    for name in FILES:
        if _find(folder, name) is None:
            _fetch_file(folder, name)


def _fetch_file(folder: Path, name: str) -> None:
    """Downloads one file from the first mirror that has it; a failure leaves no file behind."""
    import pooch

    download = pooch.HTTPDownloader(timeout=CONNECT_SECONDS)
    for mirror in MIRRORS:
        try:
            pooch.retrieve(f"{mirror}{name}.gz", f"sha256:{FILES[name]}", f"{name}.gz", folder, downloader=download)
            return
        except (OSError, ValueError) as error:  # unreachable, or a file with another hash
            reason = type(error).__name__
    raise ConfigError(
        [
            f"data=mnist: {name}.gz could not be fetched ({reason}); put {', '.join(f'{file}.gz' for file in FILES)} "
            f"into {folder}, or name their folder with data.root, or use data=digits, which needs no network"
        ]
    )


def load(root: str | None) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test set from the folder, or from the cache if it is None.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = cache_folder() if root is None else Path(root)
    missing = lacking(folder)
    if missing:
        raise ConfigError(
            [
                f"data.root={folder}: lacks {', '.join(missing)}; put them there, leave data.root out to fetch MNIST, "
                "or use data=digits, which needs no network"
            ]
        )
    return _read_split(folder, "train"), _read_split(folder, "t10k")


def lacking(folder: Path) -> list[str]:
    """The names of files that are missing in the folder, both plain and gzipped."""
    return [f"{name} (or {name}.gz)" for name in FILES if _find(folder, name) is None]


def _find(folder: Path, name: str) -> Path | None:
    """The path of the file in the folder, plain or gzipped; None if it is missing."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_split(folder: Path, prefix: str) -> ImageDataset:
    images, classes = zip(*stream_split(folder, prefix), strict=True)
    return ImageDataset(np.concatenate(images), np.concatenate(classes))


@dataclass(frozen=True)
class IdxFile:
    """A file of unsigned bytes in the IDX format, plain or gzipped.

    The format: two zero bytes, the dtype (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    int32, then the items.

    Attributes:
        path: the path of the file.
        item_shape: the required shape of an item.
        key: the configuration key of the folder, for messages.
    """

    path: Path
    item_shape: tuple[int, ...]
    key: str = "data.root"

    @property
    def count(self) -> int:
        """Number of items, from the header.

        Raises:
            ConfigError: the header is invalid, or the file cannot be read.
        """
        with self._opened() as file:
            return self._read_count(file)

    def blocks(self, num_items: int) -> Iterator[np.ndarray]:
        """Yields the items, at most num_items at a time: (n, *item_shape) uint8.

        Raises:
            ConfigError: the file is damaged; items before the damage have been yielded.
        """
        item_bytes = math.prod(self.item_shape)
        with self._opened() as file:
            count = self._read_count(file)
            size = file.tell()
            promised = size + count * item_bytes
            for first in range(0, count, num_items):
                wanted = min(num_items, count - first) * item_bytes
                content = file.read(wanted)
                size += len(content)
                if len(content) < wanted:
                    raise self._damaged(f"its header promises {promised} bytes and it has {size}")
                yield np.frombuffer(content, np.uint8).reshape(-1, *self.item_shape)
            if file.read(1):  # one byte only: the rest may be very large when it is unpacked
                raise self._damaged(f"its header promises {promised} bytes and it has more")

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        try:
            with file_io.open_regular(self.path) as file:
                if self.path.suffix == ".gz":
                    with gzip.GzipFile(fileobj=file) as unpacked:
                        yield unpacked  # type: ignore[misc]  # GzipFile has all methods of BinaryIO
                else:
                    yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise self._damaged(f"it cannot be unpacked ({error})") from error
        except OSError as error:
            raise self._damaged(f"it cannot be read ({error.strerror})") from error

    def _read_count(self, file: BinaryIO) -> int:
        num_dims = 1 + len(self.item_shape)
        header = file.read(4 + 4 * num_dims)
        if len(header) < 4 + 4 * num_dims or header[:4] != bytes([0, 0, 8, num_dims]):
            raise self._damaged(f"it does not start as an IDX file of {num_dims} dimensions of unsigned bytes does")
        count, *item_shape = (int(size) for size in np.frombuffer(header, ">i4", offset=4))
        if tuple(item_shape) != self.item_shape:
            raise self._damaged(f"its items have the shape {tuple(item_shape)} instead of {self.item_shape}")
        return count

    def _damaged(self, reason: str) -> ConfigError:
        message = f"{self.key}={self.path.parent}: {self.path.name} is damaged: {reason}; get the file again"
        return ConfigError([message])


def open_idx(folder: Path, name: str, item_shape: tuple[int, ...], key: str = "data.root") -> IdxFile:
    """The IDX file of this name, plain or gzipped; raises a FileNotFoundError if it is missing."""
    path = _find(folder, name)
    if path is None:
        raise FileNotFoundError(folder / name)
    return IdxFile(path, item_shape, key)


def num_bytes(folder: Path, prefix: str, key: str = "data.root") -> int:
    """Bytes of the images and classes of a split, from the header of the images."""
    return open_idx(folder, f"{prefix}-images-idx3-ubyte", (28, 28), key).count * (28 * 28 + 1)


def stream_split(
    folder: Path, prefix: str, key: str = "data.root", num_items: int = 4096
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields images (n, 28, 28) uint8 and their classes (n,) uint8, in blocks.

    Args:
        folder: the folder of the files.
        prefix: "train" or "t10k".
        key: the configuration key of the folder, for messages.
        num_items: number of items per block; the last block may be smaller.

    Raises:
        ConfigError: a file is damaged, or images and classes do not belong together.
    """
    images = open_idx(folder, f"{prefix}-images-idx3-ubyte", (28, 28), key)
    classes = open_idx(folder, f"{prefix}-labels-idx1-ubyte", (), key)
    counts = images.count, classes.count
    unlike = ConfigError(
        [
            f"{key}={folder}: {prefix} has {counts[0]} images and {counts[1]} labels, which must be as many, at least "
            "one, and labels from 0 to 9; get the files again"
        ]
    )
    if counts[0] != counts[1] or counts[0] < 1:
        raise unlike
    for some_images, some_classes in zip(images.blocks(num_items), classes.blocks(num_items), strict=True):
        if some_classes.max() > 9:
            raise unlike
        yield some_images, some_classes
