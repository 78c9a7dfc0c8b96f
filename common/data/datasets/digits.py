"""The 1,797 handwritten digits that come with scikit-learn, 8 x 8 pixels each, enlarged to MNIST's 28 x 28.

Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", 1998, https://doi.org/10.24432/C50P49
"""

from importlib import metadata

from common.data.datasets.split import ImageDataset

import numpy as np

NUM_TRAIN = 1437


def load() -> tuple[ImageDataset, ImageDataset]:
    """1,437 digits for training and 360 for testing, always the same."""
    # The file is read directly, because importing scikit-learn takes longer than the first epoch.
    path = metadata.distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    table = np.loadtxt(str(path), delimiter=",", dtype=np.uint8)
    pixels = table[:, :-1].reshape(-1, 8, 8) * np.uint8(15)  # 0 .. 16 -> 0 .. 240
    images = np.pad(pixels.repeat(3, axis=1).repeat(3, axis=2), ((0, 0), (2, 2), (2, 2)))
    order = np.random.default_rng(0).permutation(len(table))
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    return ImageDataset(images[train], table[train, -1]), ImageDataset(images[test], table[test, -1])
