"""The configuration's schema: one dataclass per conf group.

The dataclasses say what keys there are, of which types and units; the YAML files in conf/ have the values.
A configuration is put together by common/composition.py and checked by common/validation.py.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from omegaconf import MISSING, OmegaConf


class ConfigError(Exception):
    """The user's configuration cannot be run.

    Attributes:
        problems: one message each: key=value, the rule, the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


@dataclass
class DataConfig:
    """Where the examples come from."""

    name: str = MISSING


@dataclass
class MnistConfig(DataConfig):
    """MNIST in the four standard IDX files."""

    root: str | None = MISSING
    """Folder of the files; null: the user's cache, fetched when they are not there."""


@dataclass
class ModelConfig:
    """The model's sizes; each task has its own."""

    name: str = MISSING


@dataclass
class MLPConfig(ModelConfig):
    """A multilayer perceptron for 28 x 28 images of ten classes."""

    hidden_sizes: list[int] = MISSING
    dropout: float = MISSING
    """Probability that a hidden unit is zeroed in training; 0: none."""


@dataclass
class TrainConfig:
    """How long and on how much at a time."""

    epochs: int = MISSING
    max_steps: int | None = MISSING
    """Ends the run after so many optimizer steps; null: all epochs."""
    global_batch_size: int = MISSING
    """Examples per optimizer step over all ranks; does not grow with their number."""
    clip_norm: float = MISSING
    """Largest global L2 norm of the mean gradient; 0: no clipping."""
    log_every: int = MISSING
    """Optimizer steps between two values of train_loss."""


@dataclass
class OptimizerConfig:
    """The update rule."""

    name: str = MISSING
    lr: float = MISSING
    """Peak learning rate; lr_schedule says how it is reached and left."""


@dataclass
class SGDConfig(OptimizerConfig):
    """Stochastic gradient descent with momentum."""

    momentum: float = MISSING


@dataclass
class AdamWConfig(OptimizerConfig):
    """Adam with decoupled weight decay, on matrices only."""

    beta1: float = MISSING
    beta2: float = MISSING
    epsilon: float = MISSING
    weight_decay: float = MISSING


@dataclass
class LRScheduleConfig:
    """The learning rate over the steps."""

    name: str = MISSING
    warmup_steps: int = MISSING
    """Steps of linear growth up to optimizer.lr; 0: none."""


@dataclass
class CosineConfig(LRScheduleConfig):
    """Half a cosine from the peak down."""

    final_fraction: float = MISSING
    """Of the peak, at the last step."""


class Dtype(Enum):
    """A floating-point type; its name is that of numpy, torch and TensorFlow alike."""

    float32 = 4
    float64 = 8

    @property
    def num_bytes(self) -> int:
        """Size of one value."""
        return int(self.value)


@dataclass
class PrecisionConfig:
    """What is computed in which dtype."""

    name: str = MISSING
    dtype: Dtype = MISSING
    """Of weights, activations and gradients."""


@dataclass
class ParallelConfig:
    """How the work is spread over the ranks."""

    name: str = MISSING
    num_micro_batches: int = MISSING
    """Parts that a rank cuts its examples of one step into, one after another, to save memory; 1: none."""


@dataclass
class RunFolderConfig:
    """What the run leaves behind."""

    dir: str | None = MISSING
    """Folder for everything that is written; null: outputs/<recipe>/<date-time>."""


@dataclass
class RunConfig:
    """The whole configuration of a recipe."""

    seed: int = MISSING
    run: RunFolderConfig = MISSING
    data: DataConfig = MISSING
    model: ModelConfig = MISSING
    train: TrainConfig = MISSING
    optimizer: OptimizerConfig = MISSING
    lr_schedule: LRScheduleConfig = MISSING
    precision: PrecisionConfig = MISSING
    parallel: ParallelConfig = MISSING


@dataclass
class MnistMLPConfig(RunConfig):
    """The configuration of mnist_mlp_torch and mnist_mlp_tf."""

    model: MLPConfig = MISSING


def to_yaml(cfg: RunConfig) -> str:
    """The resolved configuration as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(cfg))


def leaves(container: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The dotted names and values of all leaves of a nested dict."""
    for name, value in container.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
