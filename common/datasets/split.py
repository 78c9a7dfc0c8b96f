"""A set of labelled images in memory."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Split:
    """Images and their classes.

    Attributes:
        images: (N, 28, 28) uint8, 0 is background.
        classes: (N,) uint8, 0 .. 9.
    """

    images: np.ndarray
    classes: np.ndarray

    def __len__(self) -> int:
        return len(self.classes)

    def take(self, examples: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """The chosen examples as a model wants them: images (B, 28, 28) float32 in [0, 1], classes (B,) int64."""
        return self.images[examples].astype(np.float32) / 255, self.classes[examples].astype(np.int64)
