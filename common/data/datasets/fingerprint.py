"""A hash that identifies the contents of a dataset, whether in memory or in shards of any size."""

import hashlib
import json
from typing import Protocol, runtime_checkable

from common.data.datasets.examples import Array

import numpy as np


@runtime_checkable
class HashedArray(Protocol):
    """An array that knows the hash of its contents."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, ...)."""

    @property
    def dtype(self) -> np.dtype:
        """The dtype of the items."""

    @property
    def sha256(self) -> str:
        """SHA-256 of the bytes of all items, little-endian, in hexadecimal."""


def little_endian(dtype: np.dtype) -> np.dtype:
    """The dtype in the byte order in which contents are hashed and stored."""
    return dtype.newbyteorder("<")


def fingerprint(**fields: Array) -> str:
    """SHA-256, in hexadecimal, over the name, dtype, shape and bytes of each field."""
    described = {}
    for name, field in fields.items():
        array = field if isinstance(field, HashedArray) else field[:]
        described[name] = [little_endian(array.dtype).str, list(array.shape), _sha256(array)]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def _sha256(array: HashedArray | np.ndarray) -> str:
    if isinstance(array, np.ndarray):
        return hashlib.sha256(np.ascontiguousarray(array, little_endian(array.dtype)).data).hexdigest()
    return array.sha256
