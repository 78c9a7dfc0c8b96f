"""What each replica sees, for all world sizes from 1 to 8."""

import dataclasses
from collections.abc import Iterable
from typing import Any

from common.config.schema import BatchSchedule, TrainConfig
from common.data.batch_schedule import BatchSizes
from common.data.sampler import SamplerState, Step, TrainingSampler, evaluation_pieces
from common.distributed.topology import Topology

import numpy as np
import pytest

WORLD_SIZES = range(1, 9)
BEGINNING = SamplerState()


def plans(
    world_size: int, num_examples: int, start: SamplerState = BEGINNING, seed: int = 7, **train: Any
) -> list[TrainingSampler]:
    """The plans of all ranks, two epochs of batches of 16 unless told otherwise."""
    values = {
        "global_batch_size": 16,
        "epochs": 2,
        "max_steps": None,
        "batch_schedule": BatchSchedule.constant,
        **train,
    }
    cfg = TrainConfig(max_batch_size=0, **values)
    ranks = [Topology(rank, world_size, rank, world_size) for rank in range(world_size)]
    return [
        TrainingSampler(cfg, num_examples, seed, topology, BatchSizes(cfg, num_examples), start) for topology in ranks
    ]


def epoch_of(steps: Iterable[Step], epoch: int) -> np.ndarray:
    return np.concatenate([step.examples for step in steps if step.epoch == epoch])


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_examples", [15, 16, 17, 79, 80, 81])
def test_each_example_once_per_epoch_and_even_parts(world_size: int, num_examples: int) -> None:
    steps = list(zip(*(plan.steps() for plan in plans(world_size, num_examples)), strict=True))
    for parts in steps:
        sizes = [len(part.examples) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sum(sizes) == parts[0].global_size
    for epoch in (1, 2):
        seen = epoch_of([part for parts in steps for part in parts], epoch)
        assert sorted(seen) == list(range(num_examples))
    assert [parts[0].ends_epoch for parts in steps].count(True) == 2
    assert steps[-1][0].progress == 1


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("growth", [[], [3, 7]])
def test_the_global_batches_do_not_depend_on_the_world_size(world_size: int, growth: list[int]) -> None:
    schedule = BatchSchedule.steps if growth else BatchSchedule.constant
    train: dict[str, Any] = {"batch_schedule": schedule, "batch_growth_steps": growth}
    (alone,) = plans(1, 81, **train)
    together = zip(*(plan.steps() for plan in plans(world_size, 81, **train)), strict=True)
    for step, parts in zip(alone.steps(), together, strict=True):
        assert np.array_equal(step.examples, np.concatenate([part.examples for part in parts]))
        assert {part.number for part in parts} == {step.number}


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_run_goes_on_where_another_stopped(stop: int) -> None:
    train: dict[str, Any] = {"batch_schedule": BatchSchedule.steps, "batch_growth_steps": [2]}
    (whole,) = plans(1, 81, **train)
    steps = list(whole.steps())
    (rest,) = plans(1, 81, start=steps[stop - 1].end, **train)
    for step, expected in zip(rest.steps(), steps[stop:], strict=True):
        assert np.array_equal(step.examples, expected.examples)
        assert (step.number, step.progress, step.end) == (expected.number, expected.progress, expected.end)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    (plan,), (other,) = plans(1, 80), plans(1, 80, seed=8)
    orders = [epoch_of(plan.steps(), epoch) for epoch in (1, 2)]
    assert not np.array_equal(orders[0], orders[1])
    assert not np.array_equal(orders[0], epoch_of(other.steps(), 1))


@pytest.mark.parametrize(("max_steps", "steps"), [(None, 10), (1, 1), (5, 5), (6, 6), (99, 10)])
def test_max_steps_ends_the_run(max_steps: int | None, steps: int) -> None:
    (plan,) = plans(1, 80, max_steps=max_steps)
    taken = list(plan.steps())
    assert [step.number for step in taken] == list(range(1, steps + 1))
    assert (taken[-1].ends_epoch, taken[-1].progress) == (True, 1)


def test_resampling_draws_all_classes_equally_often() -> None:
    classes = np.repeat([0, 1, 2], [900, 90, 10])
    (plan,) = plans(1, 1000)
    drawn = epoch_of(dataclasses.replace(plan, classes=classes).steps(), 1)
    counts = np.bincount(classes[drawn])
    assert counts.sum() == 1000
    assert counts == pytest.approx(1000 / 3, rel=0.15)
    assert len(np.unique(drawn)) > 300  # of class 0 alone a third


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_examples", [1, 7, 8, 9, 41])
def test_evaluation_takes_each_example_once(world_size: int, num_examples: int) -> None:
    parts = [
        np.arange(num_examples)[part]
        for plan in plans(world_size, num_examples)
        for _, part in evaluation_pieces(num_examples, 4, plan.topology)[1]
    ]
    assert max(map(len, parts)) <= 4
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))


@pytest.mark.parametrize("place", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 2, 1, 1), (0, 1, 0, 2)])
def test_a_rank_outside_the_job_is_refused(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not within"):
        Topology(*place)


@pytest.mark.parametrize(("cores", "local_size", "threads"), [(8, 2, 4), (2, 4, 1), (7, 2, 3), (1, 1, 1)])
def test_ranks_share_the_cores_of_their_host(cores: int, local_size: int, threads: int) -> None:
    assert Topology(0, local_size, 0, local_size).num_threads(cores) == threads
