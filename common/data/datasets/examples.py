"""The interface of a dataset."""

from typing import Protocol, TypeAlias

import numpy as np


class Array(Protocol):
    """An array in memory, or one in shards on disk (common/data/datasets/shards.py)."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape (N, ...)."""

    def __len__(self) -> int: ...

    def __getitem__(self, items: np.ndarray | slice, /) -> np.ndarray: ...


Batch: TypeAlias = tuple[np.ndarray, np.ndarray]


class Examples(Protocol):
    """A set of numbered examples."""

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the data from which the examples are made, in hexadecimal."""

    def __len__(self) -> int: ...

    def get_batch(self, examples: np.ndarray | slice, epoch: int = 0) -> Batch:
        """The inputs (B, ...) and targets (B, ...) of the chosen examples.

        Args:
            examples: the numbers of the examples.
            epoch: in training the epoch from 1, which determines the augmentation; 0: no augmentation.
        """
