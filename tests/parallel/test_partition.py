"""Balanced cuts against all cuts there are, and the rules for cuts given by hand."""

from collections.abc import Sequence
from itertools import combinations

from common.parallel.partition import balanced, problem, ranges

import numpy as np
import pytest


def value(boundaries: Sequence[int], costs: Sequence[float]) -> tuple[float, float]:
    """What balanced minimises: the costliest part, then the sum of squares."""
    parts = [sum(costs[layer] for layer in part) for part in ranges(boundaries, len(costs))]
    return max(parts), sum(part**2 for part in parts)


@pytest.mark.parametrize("seed", range(60))
def test_no_cut_is_better(seed: int) -> None:
    random = np.random.default_rng(seed)
    num_layers = int(random.integers(1, 10))
    costs = random.integers(0, 8, num_layers).tolist()
    has_weights = (random.random(num_layers) < 0.7).tolist()
    for num_chunks in range(1, sum(has_weights) + 1):
        boundaries = balanced(costs, has_weights, num_chunks)
        assert problem(boundaries, has_weights, num_chunks) is None
        cuts = combinations(range(1, num_layers), num_chunks - 1)
        valid = (cut for cut in cuts if problem(cut, has_weights, num_chunks) is None)
        assert value(boundaries, costs) == min(value(cut, costs) for cut in valid)


def test_even_layers_make_even_parts() -> None:
    assert balanced([1.0] * 12, [True] * 12, 4) == [3, 6, 9]


def test_the_cheap_parts_beside_a_costly_one_are_balanced_too() -> None:
    assert balanced([10, 1, 1, 1, 1], [True] * 5, 3) == [1, 3]


def test_layers_without_weights_stay_with_one_that_has_some() -> None:
    has_weights = [False, True, False, False, True, False]
    assert balanced([0.1, 1, 5, 5, 1, 0.1], has_weights, 2) == [3]
    assert balanced([9, 1, 0, 0, 1, 9], has_weights, 2) in ([2], [3], [4])


@pytest.mark.parametrize("num_chunks", [0, 3])
def test_too_few_layers_with_weights_are_refused(num_chunks: int) -> None:
    with pytest.raises(ValueError, match=f"2 layers with weights cannot make {num_chunks} chunks"):
        balanced([1, 1, 1], [True, False, True], num_chunks)


@pytest.mark.parametrize(
    ("boundaries", "rule"),
    [
        ([2], "3 chunks have 2 boundaries, not 1"),
        ([0, 2], "from 1 to 4"),
        ([2, 5], "from 1 to 4"),
        ([3, 2], "must ascend"),
        ([2, 2], "must ascend"),
        ([2, 3], "layers 2 to 2 has no weights"),
        ([2, 4], None),
    ],
)
def test_the_broken_rule_is_named(boundaries: list[int], rule: str | None) -> None:
    found = problem(boundaries, [True, True, False, True, True], 3)
    assert found is None if rule is None else rule in str(found)


def test_ranges_cover_the_layers() -> None:
    assert ranges([2, 5], 7) == [range(2), range(2, 5), range(5, 7)]
    assert ranges([], 3) == [range(3)]
