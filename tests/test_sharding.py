"""What each replica sees, for all world sizes from 1 to 8."""

from common.sharding import Plan, evaluation_batches
from common.topology import Topology

import numpy as np
import pytest

WORLD_SIZES = range(1, 9)


def plans(
    world_size: int, num_examples: int, batch: int = 16, epochs: int = 2, max_steps: int | None = None
) -> list[Plan]:
    ranks = [Topology(rank, world_size, rank, world_size) for rank in range(world_size)]
    return [Plan(num_examples, batch, epochs, max_steps, seed=7, topology=topology) for topology in ranks]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_examples", [15, 16, 17, 79, 80, 81])
def test_each_example_once_per_epoch_and_even_parts(world_size: int, num_examples: int) -> None:
    for epoch in (1, 2):
        steps = list(zip(*(plan.steps(epoch) for plan in plans(world_size, num_examples)), strict=True))
        for parts in steps:
            sizes = [len(part.examples) for part in parts]
            assert max(sizes) - min(sizes) <= 1
            assert sum(sizes) == parts[0].global_size
        seen = np.concatenate([part.examples for parts in steps for part in parts])
        assert sorted(seen) == list(range(num_examples))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_global_batches_do_not_depend_on_the_world_size(world_size: int) -> None:
    (alone,) = plans(1, 81)
    together = zip(*(plan.steps(2) for plan in plans(world_size, 81)), strict=True)
    for step, parts in zip(alone.steps(2), together, strict=True):
        assert np.array_equal(step.examples, np.concatenate([part.examples for part in parts]))
        assert {part.number for part in parts} == {step.number}


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    (plan,) = plans(1, 80)
    orders = [np.concatenate([step.examples for step in plan.steps(epoch)]) for epoch in (1, 2)]
    assert not np.array_equal(orders[0], orders[1])
    other = Plan(80, 16, 2, None, seed=8, topology=plan.topology)
    assert not np.array_equal(orders[0], np.concatenate([step.examples for step in other.steps(1)]))


@pytest.mark.parametrize(
    ("max_steps", "steps", "epochs"), [(None, 10, 2), (1, 1, 1), (5, 5, 1), (6, 6, 2), (99, 10, 2)]
)
def test_max_steps_ends_the_run(max_steps: int | None, steps: int, epochs: int) -> None:
    (plan,) = plans(1, 80, max_steps=max_steps)
    assert (plan.total_steps, plan.total_epochs) == (steps, epochs)
    numbers = [step.number for epoch in range(1, epochs + 1) for step in plan.steps(epoch)]
    assert numbers == list(range(1, steps + 1))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("num_examples", [1, 7, 8, 9, 41])
def test_evaluation_takes_each_example_once(world_size: int, num_examples: int) -> None:
    parts = [
        np.arange(num_examples)[part]
        for plan in plans(world_size, num_examples)
        for part in evaluation_batches(num_examples, 4, plan.topology)
    ]
    assert max(map(len, parts)) <= 4
    assert np.array_equal(np.concatenate(parts), np.arange(num_examples))


@pytest.mark.parametrize("place", [(2, 2, 0, 1), (-1, 2, 0, 1), (0, 2, 1, 1), (0, 1, 0, 2)])
def test_a_rank_outside_the_job_is_refused(place: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="is not within"):
        Topology(*place)


@pytest.mark.parametrize(("cores", "local_size", "threads"), [(8, 2, 4), (2, 4, 1), (7, 2, 3), (1, 1, 1)])
def test_ranks_share_the_cores_of_their_host(cores: int, local_size: int, threads: int) -> None:
    assert Topology(0, local_size, 0, local_size).num_threads(cores) == threads
