"""The learning rate and the packing of gradients."""

import dataclasses
from functools import partial

from common.config.composition import compose, option
from common.config.layout import process_sets
from common.config.schema import AdamWConfig, BatchSchedule, ReduceOp, Scope, SGDConfig, TrainConfig
from common.data.batch_schedule import DELAY, BatchSizes, learning_rate_factor
from common.data.datasets.augment import shift_and_turn, uniform
from common.data.prefetch import DEPTH
from common.data.sampler import TrainingSampler
from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.autotune import Estimate, best
from common.training.lr_schedule import learning_rate

import numpy as np
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


def test_random_numbers_depend_on_seed_epoch_and_example_alone() -> None:
    numbers = np.arange(20_000)
    drawn = uniform(1, 2, numbers, 3)
    assert np.array_equal(drawn[[7, 5]], uniform(1, 2, np.array([7, 5]), 3))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert np.abs(drawn.mean(axis=0) - 0.5).max() < 0.01
    assert (
        np.abs(np.corrcoef([*drawn.T, *uniform(1, 3, numbers, 3).T, *uniform(2, 2, numbers, 3).T]) - np.eye(9)).max()
        < 0.03
    )


def test_images_are_shifted_and_turned() -> None:
    image = np.zeros((28, 28), np.float32)
    image[5, 9] = 1
    images = np.stack([image] * 3)
    moved = shift_and_turn(images, np.array([[0, 0], [2, -3], [0, 0]]), np.array([0, 0, np.pi / 2]))
    assert np.array_equal(moved[0], image)
    assert np.argwhere(moved[1] > 0.99).tolist() == [[7, 6]]
    assert np.argwhere(moved[2] > 0.99).tolist() == [[9, 22]]
    assert shift_and_turn(images, np.full((3, 2), 14), np.zeros(3)).sum() == pytest.approx(3)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([4, 4, 4, 4], [[3, 2], [1, 0]]),
        ([4, 100, 4], [[2], [1], [0]]),
        ([4], [[0]]),
        ([], []),
        ([0, 8, 0], [[2, 1, 0]]),
    ],
)
def test_buckets_hold_each_gradient_once_last_first(sizes: list[int], expected: list[list[int]]) -> None:
    assert bucketing.assign(sizes, bucket_bytes=8) == expected


@pytest.mark.parametrize(("num_ranks", "sent"), [(1, 0), (2, 4000), (4, 6000), (8, 7000)])
def test_ring_allreduce_sends_by_the_formula(num_ranks: int, sent: int) -> None:
    assert bucketing.allreduce_bytes(4000, num_ranks) == sent


@pytest.mark.parametrize(("min_gain", "chosen"), [(0.1, "sign"), (0.3, "int8"), (0.6, "none")])
def test_auto_takes_the_first_method_that_none_after_it_beats_by_enough(min_gain: float, chosen: str) -> None:
    seconds = {"none": 0.9, "int8": 0.4, "powersgd": 0.45, "sign": 0.3}
    estimates = [Estimate(method, exchange, 0) for method, exchange in seconds.items()]
    assert best(estimates, compute_seconds=0.1, min_gain=min_gain).method == chosen


def test_buckets_keep_small_weights_apart_and_have_an_uncompressed_one_last() -> None:
    shapes = [(100, 40), (40,), (200, 6), (30,)]
    buckets_of = partial(bucketing.of_model, shapes, 4, op=ReduceOp.average, max_bytes=10**6)
    sign, powersgd = option("compression", "sign"), option("compression", "powersgd")
    found = [(bucket.method, bucket.members, bucket.num_values) for bucket in buckets_of(compression=sign)]
    assert found == [("sign", (2, 0), 5200), ("none", (3, 1), 70)]
    sign.scope, sign.min_numel = Scope.layer, 0
    assert [bucket.members for bucket in buckets_of(compression=sign)] == [(3,), (2,), (1,), (0,), ()]
    # Two factors of 4 columns are less than half of 100 x 40, but not of 200 x 6.
    assert [bucket.members for bucket in buckets_of(compression=powersgd)] == [(0,), (3, 2, 1)]


def test_hosts_and_their_first_ranks_exchange_among_themselves() -> None:
    cfg = compose("mnist_mlp", ["compression=topk", "compression.two_level=true"])
    sets = process_sets(Topology(5, 6, 1, 2), cfg)
    assert [list(ranks) for ranks in sets] == [[0, 1], [2, 3], [4, 5], [0, 2, 4]]
    assert process_sets(Topology(1, 2, 1, 2), cfg) == []
