"""The packing of gradients, and the choice of a compressor."""

from functools import partial

from common.config.composition import option
from common.config.schema import ReduceOp, Scope
from common.gradients import bucketing
from common.gradients.autotune import Estimate, best

import pytest


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
