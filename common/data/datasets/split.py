"""A set of labelled images, in memory or in shards on disk."""

from dataclasses import dataclass
from functools import cached_property

from common.data.datasets.examples import Array, Batch
from common.data.datasets.fingerprint import fingerprint

import numpy as np


@dataclass(frozen=True)
class ImageDataset:
    """Images and their classes.

    Attributes:
        images: (N, 28, 28) uint8, 0 is background.
        classes: (N,) uint8, 0 .. 9.
    """

    images: Array
    classes: Array

    def __len__(self) -> int:
        return len(self.classes)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of images and classes, in hexadecimal."""
        return fingerprint(images=self.images, classes=self.classes)

    def get_batch(self, examples: np.ndarray | slice, epoch: int = 0) -> Batch:
        """The chosen examples as input of a model: images (B, 28, 28) float32 in [0, 1], classes (B,) int64."""
        return self.images[examples].astype(np.float32) / 255, self.classes[examples].astype(np.int64)
