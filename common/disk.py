"""Files that are read with care and written to last.

Read: whoever can put a file into a folder may have put anything there. Written: a name stands for whole contents even
after a power cut.
"""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any, BinaryIO


def open_regular(path: Path) -> BinaryIO:
    """Opens a file to read.

    Raises:
        OSError: it cannot be opened, or is a folder, a FIFO or a device, where reading could wait for ever.
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
    """What JSON text stands for.

    Raises:
        ValueError: it is not JSON, or nested more deeply than Python reads.
    """
    try:
        return json.loads(content)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def sync(file: BinaryIO) -> None:
    """Waits until a file's contents are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_path(path: Path) -> None:
    """Waits until what others have written to a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
