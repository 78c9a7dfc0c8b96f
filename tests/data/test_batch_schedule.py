"""Batches that grow."""

import dataclasses

from common.config.schema import BatchSchedule, TrainConfig
from common.data.batch_schedule import DELAY, BatchSizes
from common.data.prefetch import DEPTH

import pytest


def train_config(schedule: BatchSchedule, **values: object) -> TrainConfig:
    return TrainConfig(global_batch_size=64, batch_schedule=schedule, **{"max_batch_size": 0, **values})  # type: ignore[arg-type]


def test_the_batch_doubles_at_given_steps_up_to_its_bound() -> None:
    cfg = train_config(BatchSchedule.steps, batch_growth_steps=[2, 4, 6], max_batch_size=200)
    for num_examples, largest in ((1437, 200), (150, 150), (40, 64)):  # beyond the examples no batch grows
        sizes = BatchSizes(cfg, num_examples)
        expected = [64, 64, 128, 128, 200, 200, 200, 200]
        assert [sizes.at(step) for step in range(1, 9)] == [min(size, largest) for size in expected]


def test_the_batch_follows_the_noise_scale_of_known_gradients() -> None:
    # Gradients g + noise / sqrt(batch): |g|^2 = 1, trace of the covariance 300, so that the noise scale is 300.
    sizes = BatchSizes(train_config(BatchSchedule.noise_scale), 10**6)
    for step in range(1, 1001):
        size = sizes.at(step)
        of_ranks = [size // 2, size // 4, size // 4, 0]  # one has no examples, and adds nothing to the sum
        local = sum(1 + 300 / of_rank for of_rank in of_ranks if of_rank)
        sizes.observe(step, local, 1 + 300 / size, of_ranks)
    assert sizes.noise_scale == pytest.approx(300)
    assert [size for _, size in sizes.changes] == [64, 128, 256, 512]
    assert DELAY > DEPTH + 1  # steps that are read ahead keep their size
    again = BatchSizes.from_json(sizes.cfg, 10**6, sizes.to_json())
    assert again == sizes
    smaller = dataclasses.replace(sizes.cfg, global_batch_size=16)
    assert BatchSizes.from_json(smaller, 10**6, sizes.to_json()).at(2000) == 16
