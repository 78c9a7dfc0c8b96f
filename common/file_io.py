"""Safe reading and durable writing of files.

Reading does not trust the contents of a folder. Writing ensures that a file under its final name is complete, even
after a power cut.
"""

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterable
from contextlib import suppress
from io import BufferedReader
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO

MAX_DEPTH = 100  # limit for nested JSON, so that recursive code can traverse and write it
MAX_REASON = 300  # characters


def open_regular(path: Path) -> BufferedReader:
    """Opens a regular file for reading.

    Raises:
        OSError: it cannot be opened, or is a folder, a FIFO or a device, which might never return from a read.
    """
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_bytes(path: Path) -> bytes:
    """The contents of a regular file.

    Raises:
        OSError: see open_regular().
    """
    with open_regular(path) as file:
        return file.read()


def parse_json(content: str | bytes) -> Any:
    """Parses JSON text.

    Raises:
        ValueError: it is not JSON, or is nested more than MAX_DEPTH deep.
    """
    too_deep = ValueError(f"it is nested more than {MAX_DEPTH} deep")
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise too_deep from error
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for node in level for child in _children(node) if isinstance(child, dict | list)]
    if level:
        raise too_deep
    return value


def _children(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return node.values()
    return node if isinstance(node, list) else ()


def brief(reason: object) -> str:
    """An error message as one printable line of at most about MAX_REASON characters."""
    line = "".join(character if character.isprintable() else " " for character in str(reason))
    return line if len(line) <= MAX_REASON else f"{line[:MAX_REASON]}..."


def sha256(file: BinaryIO) -> str:
    """SHA-256, in hexadecimal, of what is left to read of a file."""
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def sync(file: BinaryIO) -> None:
    """Waits until a file's contents are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Waits until a file that is already written, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(path: Path) -> None:
    """Makes a folder that may exist, and those above it; waits until its name is on the disk, if that is allowed."""
    if not path.parent.exists():
        make_folder(path.parent)
    path.mkdir(exist_ok=True)
    with suppress(PermissionError):  # a folder that others own may not be read
        sync_path(path.parent)


def replace(path: Path, content: str) -> None:
    """Writes a file, whose name has either its old contents or the new ones at any time."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("wb") as file:
        file.write(content.encode())
        sync(file)
    unfinished.rename(path)
    sync_path(path.parent)


def unused(path: Path) -> Path:
    """The path, or the path with a number appended if it already exists."""
    paths = chain([path], (path.with_name(f"{path.name}.{number}") for number in count(2)))
    return next(candidate for candidate in paths if not os.path.lexists(candidate))
