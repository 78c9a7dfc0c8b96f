"""Examples drawn from a linear model with noise, and their least-squares solution."""

from dataclasses import dataclass

from common.config.schema import LinearDataConfig
from common.data.datasets.examples import Batch
from common.data.datasets.fingerprint import fingerprint

import numpy as np


@dataclass(frozen=True)
class Measurements:
    """Features and targets.

    Attributes:
        features: (N, F) float32, normally distributed.
        targets: (N, 1) float32, a linear function of the features plus noise.
    """

    features: np.ndarray
    targets: np.ndarray

    @property
    def fingerprint(self) -> str:
        """SHA-256 of features and targets, in hexadecimal."""
        return fingerprint(features=self.features, targets=self.targets)

    def __len__(self) -> int:
        return len(self.targets)

    def get_batch(self, examples: np.ndarray | slice, epoch: int = 0) -> Batch:
        """Features (B, F) and targets (B, 1) of the chosen examples."""
        return self.features[examples], self.targets[examples]

    def least_squares(self) -> np.ndarray:
        """(F + 1,) float64: the weights and the bias with the smallest mean squared error."""
        inputs = np.hstack([self.features, np.ones((len(self), 1))]).astype(np.float64)
        return np.linalg.lstsq(inputs, self.targets[:, 0].astype(np.float64))[0]


def load(cfg: LinearDataConfig, seed: int) -> Measurements:
    """Draws the examples with a seed."""
    random = np.random.default_rng(seed)
    features = random.standard_normal((cfg.num_examples, cfg.num_features))
    weights, bias = random.standard_normal(cfg.num_features), random.standard_normal()
    targets = features @ weights + bias + cfg.noise * random.standard_normal(cfg.num_examples)
    return Measurements(features.astype(np.float32), targets.astype(np.float32)[:, None])
