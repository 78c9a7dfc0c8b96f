"""MNIST in its four IDX files, gzipped or not, from a folder or fetched into the user's cache.

Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998, http://yann.lecun.com/exdb/mnist/
"""

import gzip
import math
import zlib
from pathlib import Path

from common.config import ConfigError
from common.datasets.split import Split

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
    """Where fetched files are kept."""
    import pooch

    return Path(pooch.os_cache("horovod-recipes")) / "mnist"


def fetch(folder: Path) -> None:
    """Fetches the files that the folder lacks, trying each mirror in turn.

    Raises:
        ConfigError: no mirror gave a file with the right SHA-256.
    """
    import pooch

    pooch.get_logger().setLevel("WARNING")
    for name in FILES:
        if _find(folder, name) is None:
            _fetch_file(folder, name)


def _fetch_file(folder: Path, name: str) -> None:
    """Fetches one file from the first mirror that has it; a failure leaves nothing behind."""
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


def load(root: str | None) -> tuple[Split, Split]:
    """The training and the test digits from the folder, or from the cache when it is None.

    Raises:
        ConfigError: a file is missing or damaged.
    """
    folder = cache_folder() if root is None else Path(root)
    missing = [f"{name} (or {name}.gz)" for name in FILES if _find(folder, name) is None]
    if missing:
        raise ConfigError(
            [
                f"data.root={folder}: lacks {', '.join(missing)}; put them there, leave data.root out to fetch MNIST, "
                "or use data=digits, which needs no network"
            ]
        )
    return _read_split(folder, "train"), _read_split(folder, "t10k")


def _find(folder: Path, name: str) -> Path | None:
    """The file of this name in the folder, plain or gzipped."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read_split(folder: Path, prefix: str) -> Split:
    images = read_idx(folder, f"{prefix}-images-idx3-ubyte", item_shape=(28, 28))
    classes = read_idx(folder, f"{prefix}-labels-idx1-ubyte", item_shape=())
    if len(images) != len(classes) or not len(classes) or classes.max() > 9:
        raise ConfigError(
            [
                f"data.root={folder}: {prefix} has {len(images)} images and {len(classes)} labels, which must be as "
                "many, at least one, and labels from 0 to 9; get the files again"
            ]
        )
    return Split(images, classes)


def read_idx(folder: Path, name: str, item_shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes: (N, *item_shape) uint8.

    The format: two zero bytes, the dtype (8: unsigned byte), the number of dimensions, each dimension as a big-endian
    int32, then the items.

    Raises:
        ConfigError: the file is not such a file, or is cut off.
    """
    path = _find(folder, name)
    if path is None:
        raise FileNotFoundError(folder / name)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, f"it cannot be unpacked ({error})") from error
    num_dims = 1 + len(item_shape)
    header = 4 + 4 * num_dims
    if len(content) < header or content[:4] != bytes([0, 0, 8, num_dims]):
        raise _damaged(path, f"it does not start as an IDX file of {num_dims} dimensions of unsigned bytes does")
    shape = tuple(int(size) for size in np.frombuffer(content, ">i4", num_dims, offset=4))
    if shape[1:] != item_shape:
        raise _damaged(path, f"its items have the shape {shape[1:]} instead of {item_shape}")
    if len(content) != header + math.prod(shape):
        raise _damaged(path, f"its header promises {header + math.prod(shape)} bytes and it has {len(content)}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _damaged(path: Path, reason: str) -> ConfigError:
    return ConfigError([f"data.root={path.parent}: {path.name} is damaged: {reason}; get the file again"])
