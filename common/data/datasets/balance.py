"""Balances classes with unequal numbers of examples (data.balance)."""

from common.config.schema import Balance, ImagesConfig
from common.data.datasets.split import ImageDataset

import numpy as np


def drawn_classes(cfg: ImagesConfig, split: ImageDataset) -> np.ndarray | None:
    """The (N,) classes if an epoch draws all classes equally often, else None."""
    return split.classes[:] if cfg.balance is Balance.resample else None


def class_weights(cfg: ImagesConfig, split: ImageDataset) -> np.ndarray:
    """(10,) float32 factors on the losses of each class; their average over the examples is 1."""
    if cfg.balance is not Balance.weight_loss:
        return np.ones(10, np.float32)
    counts = np.bincount(split.classes[:], minlength=10)
    weights: np.ndarray = np.divide(len(split), counts * np.count_nonzero(counts), where=counts > 0, out=np.zeros(10))
    return weights.astype(np.float32)
