"""The learning rate and the packing of gradients."""

from common import buckets
from common.config import CosineConfig, Dtype, LRScheduleConfig
from common.learning_rate import learning_rate

import pytest


def test_cosine_with_warm_up() -> None:
    cfg = CosineConfig("cosine", warmup_steps=10, final_fraction=0.1)
    rates = {step: learning_rate(step, 110, 2.0, cfg) for step in (1, 10, 60, 110)}
    assert rates == pytest.approx({1: 0.2, 10: 2.0, 60: 1.1, 110: 0.2})


@pytest.mark.parametrize("warmup_steps", [0, 3, 5, 9])
def test_any_length_of_warm_up_gives_finite_rates(warmup_steps: int) -> None:
    constant = LRScheduleConfig("constant", warmup_steps)
    cosine = CosineConfig("cosine", warmup_steps, 0.0)
    for step in range(1, 6):
        assert 0 <= learning_rate(step, 5, 1.0, cosine) <= learning_rate(step, 5, 1.0, constant) <= 1


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
    assert buckets.assign(sizes, bucket_bytes=8) == expected


@pytest.mark.parametrize(("num_replicas", "sent"), [(1, 0), (2, 4000), (4, 6000), (8, 7000)])
def test_ring_allreduce_sends_by_the_formula(num_replicas: int, sent: int) -> None:
    assert buckets.allreduce_bytes(1000, Dtype.float32, num_replicas) == sent
    assert buckets.allreduce_bytes(1000, Dtype.float64, num_replicas) == 2 * sent
