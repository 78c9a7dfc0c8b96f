"""What is done about classes of unlike numbers of examples (data.balance)."""

from common.config import Balance, ImagesConfig
from common.datasets.split import Split

import numpy as np


def drawn_classes(cfg: ImagesConfig, split: Split) -> np.ndarray | None:
    """The (N,) classes when an epoch is to draw all of them equally often, else None."""
    return split.classes[:] if cfg.balance is Balance.resample else None


def class_weights(cfg: ImagesConfig, split: Split) -> np.ndarray:
    """(10,) float32 by which the losses of a class are multiplied; 1 on average over the examples."""
    if cfg.balance is not Balance.weight_loss:
        return np.ones(10, np.float32)
    counts = np.bincount(split.classes[:], minlength=10)
    weights: np.ndarray = np.divide(len(split), counts * np.count_nonzero(counts), where=counts > 0, out=np.zeros(10))
    return weights.astype(np.float32)
