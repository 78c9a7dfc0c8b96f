"""Balances classes with unequal numbers of examples (data.balance)."""

from common.config.schema import Balance, ImagesConfig
from common.data.datasets.examples import Array

import numpy as np


def drawn_classes(cfg: ImagesConfig, classes: Array) -> np.ndarray | None:
    """The (N,) classes if an epoch draws all classes equally often, else None."""
    return classes[:] if cfg.balance is Balance.resample else None


def class_weights(cfg: ImagesConfig, classes: Array) -> np.ndarray:
    """(10,) float32 factors on the losses of each class; their average over the examples is 1."""
    if cfg.balance is not Balance.weight_loss:
        return np.ones(10, np.float32)
    counts = np.bincount(classes[:], minlength=10)
    weights: np.ndarray = np.divide(len(classes), counts * np.count_nonzero(counts), where=counts > 0, out=np.zeros(10))
    return weights.astype(np.float32)
