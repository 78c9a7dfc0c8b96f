"""Augmentation of training images by small random shifts and rotations.

The augmentation of an image depends only on the seed, the epoch and the example's number, not on the number of ranks or
the order of reading.
"""

from dataclasses import dataclass

from common.config.schema import ImagesConfig
from common.data.datasets.examples import Array, Batch
from common.data.datasets.split import ImageDataset

import numpy as np


@dataclass(frozen=True)
class Augmented:
    """The images of another set, which are shifted and rotated if an epoch is given.

    Attributes:
        examples: the other set, whose inputs are (B, height, width) float32 in [0, 1].
        cfg: the configuration of the largest shift and rotation.
        seed: the seed of the run.
    """

    examples: ImageDataset
    cfg: ImagesConfig
    seed: int

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the original images."""
        return self.examples.fingerprint

    @property
    def classes(self) -> Array:
        """(N,) the classes of the images."""
        return self.examples.classes

    def __len__(self) -> int:
        return len(self.examples)

    def get_batch(self, examples: np.ndarray | slice, epoch: int = 0) -> Batch:
        """The inputs and targets of the chosen examples, without augmentation for epoch 0."""
        images, targets = self.examples.get_batch(examples)
        if epoch and (self.cfg.max_shift or self.cfg.max_rotation):
            numbers = np.arange(len(self))[examples] if isinstance(examples, slice) else examples
            fractions = 2 * uniform(self.seed, epoch, numbers, 3) - 1  # in [-1, 1)
            shifts = np.round(fractions[:, :2] * self.cfg.max_shift)
            images = shift_and_turn(images, shifts, np.deg2rad(fractions[:, 2] * self.cfg.max_rotation))
        return images, targets


def uniform(seed: int, epoch: int, numbers: np.ndarray, count: int) -> np.ndarray:
    """(len(numbers), count) float64 in [0, 1); each is a hash of the seed, the epoch, the number and its column.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014,
    https://doi.org/10.1145/2714064.2660195 (the mixing function of SplitMix64)
    """
    keys = np.stack([numbers.astype(np.uint64)] * count, axis=1)
    for words in (np.arange(count), np.array([epoch]), np.array([seed])):  # arrays, as scalars warn of overflow
        keys = _mixed(keys + np.uint64(0x9E3779B97F4A7C15) * (words.astype(np.uint64) + np.uint64(1)))
    fractions: np.ndarray = (keys >> np.uint64(11)) / float(1 << 53)
    return fractions


def _mixed(keys: np.ndarray) -> np.ndarray:
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = keys ^ (keys >> np.uint64(31))
    return mixed


def shift_and_turn(images: np.ndarray, shifts: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """Shifts images (B, height, width) by shifts (B, 2) in pixels and rotates them about their centres by angles (B,).

    Angles are in radians. Each pixel is interpolated bilinearly from the four pixels around its source position;
    everything outside the image is 0.
    """
    _, height, width = images.shape
    shifts, angles = shifts.astype(np.float32), angles.astype(np.float32)
    rows = np.arange(height, dtype=np.float32)[None, :, None] - (height - 1) / 2 - shifts[:, 0, None, None]
    columns = np.arange(width, dtype=np.float32)[None, None, :] - (width - 1) / 2 - shifts[:, 1, None, None]
    cosines, sines = (function(angles)[:, None, None] for function in (np.cos, np.sin))
    from_row = cosines * rows - sines * columns + (height - 1) / 2
    from_column = sines * rows + cosines * columns + (width - 1) / 2
    padded = np.pad(images, ((0, 0), (1, 2), (1, 2)))  # a border of 0, to which positions outside are clipped
    from_row = np.clip(from_row, -1, height) + np.float32(1)
    from_column = np.clip(from_column, -1, width) + np.float32(1)
    top, left = from_row.astype(np.int32), from_column.astype(np.int32)
    down, right = from_row - top.astype(np.float32), from_column - left.astype(np.float32)
    flat = padded.reshape(-1)
    corner = (np.arange(len(images), dtype=np.int32)[:, None, None] * (height + 3) + top) * (width + 3) + left
    upper = flat[corner] * (1 - right) + flat[corner + 1] * right
    lower = flat[corner + width + 3] * (1 - right) + flat[corner + width + 4] * right
    moved: np.ndarray = upper * (1 - down) + lower * down
    return moved
