"""Waits until what was written is on the disk, so that a name stands for whole contents even after a power cut."""

import os
from pathlib import Path
from typing import BinaryIO


def sync(file: BinaryIO) -> None:
    """Waits until a file's contents are on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Waits until a folder's entries are on the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
