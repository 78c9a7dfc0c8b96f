"""The sources of examples, and what is wrong with files."""

import gzip
import hashlib
import http.server
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from common.config.schema import Balance, ImagesConfig
from common.data import datasets
from common.data.datasets import digits, mnist
from common.errors import ConfigError
from tests.helpers.idx import write_idx

import numpy as np
import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four IDX files of 20 and 10 digits, gzipped and not."""
    train, test = digits.load()
    for prefix, split, size, ending in (("train", train, 20, ".gz"), ("t10k", test, 10, "")):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte{ending}", split.images[:size])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte{ending}", split.classes[:size])
    return tmp_path


def test_digits_are_a_fixed_split_of_28_by_28_images() -> None:
    train, test = digits.load()
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 28, 28)
    digest = hashlib.sha256(train.images[:].tobytes() + test.classes[:].tobytes()).hexdigest()
    assert digest[:16] == "a16267b8110cae6f"
    images, classes = test.get_batch(np.array([0, 3]))
    assert images.dtype == np.float32
    assert (images.min(), images.max() > 0.9) == (0, True)
    assert classes.tolist() == test.classes[np.array([0, 3])].tolist()


def test_idx_files_are_read_plain_and_gzipped(folder: Path) -> None:
    expected = digits.load()
    for split, source, size in zip(mnist.load(str(folder)), expected, (20, 10), strict=True):
        assert np.array_equal(split.images[:], source.images[:size])
        assert np.array_equal(split.classes[:], source.classes[:size])


def damaged_file(folder: Path, name: str, how: str) -> None:
    path = folder / name
    content = path.read_bytes()
    changed = {
        "cut": content[: len(content) // 2],
        "empty": b"",
        "other": b"\x00\x00\x0d\x01" + content[4:],
        "longer": content + b"\x00",
    }
    path.write_bytes(changed[how])


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("train-images-idx3-ubyte.gz", "cut", "cannot be unpacked"),
        ("train-images-idx3-ubyte.gz", "other", "cannot be unpacked"),
        ("t10k-images-idx3-ubyte", "cut", "its header promises 7856 bytes and it has 3928"),
        ("t10k-images-idx3-ubyte", "longer", "its header promises 7856 bytes and it has more"),
        ("t10k-labels-idx1-ubyte", "empty", "does not start as an IDX file"),
        ("t10k-labels-idx1-ubyte", "other", "does not start as an IDX file"),
    ],
)
def test_damage_is_named_by_file(folder: Path, name: str, how: str, message: str) -> None:
    damaged_file(folder, name, how)
    with pytest.raises(ConfigError) as error:
        mnist.load(str(folder))
    assert f"data.root={folder}: {name} is damaged" in str(error.value)
    assert message in str(error.value)


def test_a_source_without_code_is_refused() -> None:
    cfg = ImagesConfig("pictures", False, Balance.none, 0, 0.0)
    with pytest.raises(ConfigError, match=r"data=pictures: there is no code .* choose digits\|image_shards\|mnist"):
        datasets.load_images(cfg)
    with pytest.raises(ConfigError, match="no code for a ImagesConfig of this name"):
        datasets.load_images(ImagesConfig("mnist", False, Balance.none, 0, 0.0))


def test_what_follows_the_items_is_not_unpacked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "train-images-idx3-ubyte.gz"
    num_bytes = len(gzip.decompress(path.read_bytes()))
    path.write_bytes(path.read_bytes() + gzip.compress(bytes(1 << 24)) * 4)
    taken = []

    class Counted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            taken.append(super().read(size))
            return taken[-1]

    monkeypatch.setattr(gzip, "GzipFile", Counted)
    with pytest.raises(ConfigError, match=f"its header promises {num_bytes} bytes and it has more"):
        mnist.load(str(folder))
    assert sum(map(len, taken)) < 3 * num_bytes  # the header is read twice


def test_files_that_do_not_belong_together(folder: Path) -> None:
    write_idx(folder / "t10k-labels-idx1-ubyte", np.zeros(11, np.uint8))
    with pytest.raises(ConfigError, match="t10k has 10 images and 11 labels"):
        mnist.load(str(folder))


def test_missing_files_and_folders_are_named(folder: Path) -> None:
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ConfigError, match=r"lacks t10k-labels-idx1-ubyte \(or t10k-labels-idx1-ubyte.gz\)"):
        mnist.load(str(folder))


class Files(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, format: str, *args: object) -> None:
        """Keeps quiet."""


@pytest.fixture
def mirror(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A mirror on this host, with the folder's files in gzipped form, whose hashes are the expected ones."""
    for name in mnist.FILES:
        path = folder / f"{name}.gz"
        if not path.exists():
            path.write_bytes(gzip.compress((folder / name).read_bytes()))
        monkeypatch.setitem(mnist.FILES, name, hashlib.sha256(path.read_bytes()).hexdigest())
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Files, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


def test_missing_files_are_fetched_from_the_next_mirror(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (f"{mirror}nothing-here/", mirror))
    mnist.fetch(tmp_path / "cache")
    train, test = mnist.load(str(tmp_path / "cache"))
    assert (len(train), len(test)) == (20, 10)


def test_a_mirror_with_other_files_leaves_nothing_behind(
    mirror: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "MIRRORS", (mirror,))
    monkeypatch.setitem(mnist.FILES, "train-images-idx3-ubyte", "0" * 64)
    with pytest.raises(ConfigError) as error:
        mnist.fetch(tmp_path / "cache")
    for part in ("train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz", str(tmp_path / "cache"), "data=digits"):
        assert part in str(error.value)
    assert not list((tmp_path / "cache").glob("*"))
