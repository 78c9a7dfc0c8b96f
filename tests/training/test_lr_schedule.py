"""The learning rate of each step."""

from common.config.composition import compose
from common.config.schema import AdamWConfig, SGDConfig
from common.data.batch_schedule import learning_rate_factor
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.training.lr_schedule import learning_rate

import pytest

ALONE = Topology(0, 1, 0, 1)


def rates(*overrides: str) -> list[float]:
    """The learning rate of each of ten steps."""
    cfg = compose("mnist_mlp", ["train.max_steps=10", "optimizer.lr=2", *overrides])
    return [learning_rate(step, cfg) for step in TrainingSampler.from_config(cfg, 1000, ALONE).steps()]


def test_cosine_falls_to_its_fraction_and_constant_does_not() -> None:
    falling = rates("lr_schedule.warmup_steps=0", "lr_schedule.final_fraction=0.1")
    assert falling[4] == pytest.approx(1.1)
    assert falling[9] == pytest.approx(0.2)
    assert rates("lr_schedule=constant") == [2.0] * 10


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 3, 10, 20])
def test_warm_up_multiplies(schedule: str, warmup_steps: int) -> None:
    plain = rates(f"lr_schedule={schedule}", "lr_schedule.warmup_steps=0")
    warm = rates(f"lr_schedule={schedule}", f"lr_schedule.warmup_steps={warmup_steps}")
    factors = [min(1.0, step / warmup_steps) if warmup_steps else 1.0 for step in range(1, 11)]
    assert warm == pytest.approx([rate * factor for rate, factor in zip(plain, factors, strict=True)])


def test_the_learning_rate_grows_with_the_batch() -> None:
    sgd, adamw = SGDConfig(name="sgd"), AdamWConfig(name="adamw")
    assert (learning_rate_factor(256, 64, sgd), learning_rate_factor(256, 64, adamw)) == (4, 2)
    growing = rates("lr_schedule=constant", "train.batch_schedule=steps", "train.batch_growth_steps=[3,6]")
    assert growing == [2.0] * 3 + [4.0] * 3 + [8.0] * 4
