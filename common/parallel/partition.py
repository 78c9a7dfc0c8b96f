"""Where a list of layers is cut into consecutive model chunks for a pipeline.

Boundaries are the numbers of the first layer of each chunk, without chunk 0: [2, 5] cuts 7 layers into 0-1, 2-4, 5-6.
"""

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise


def balanced(costs: Sequence[float], has_weights: Sequence[bool], num_chunks: int) -> list[int]:
    """The boundaries with the smallest maximum cost of a chunk and, among these, the smallest sum of squared costs.

    Args:
        costs: the cost of each layer, at least 0, in any unit.
        has_weights: for each layer, whether it has weights; each chunk gets at least one layer with weights, because
            its optimizer needs some.
        num_chunks: number of chunks.

    Returns:
        num_chunks - 1 ascending layer numbers.

    Raises:
        ValueError: there are fewer layers with weights than chunks.
    """
    if not 1 <= num_chunks <= sum(has_weights):
        raise ValueError(f"{sum(has_weights)} layers with weights cannot make {num_chunks} chunks with weights each")
    cost_before, weights_before = ([0, *accumulate(values)] for values in (costs, has_weights))

    def cost(start: int, end: int) -> float:
        has_any = weights_before[end] > weights_before[start]
        return cost_before[end] - cost_before[start] if has_any else math.inf

    def square(start: int, end: int) -> float:
        return cost(start, end) ** 2 if cost(start, end) <= limit else math.inf

    limit, _ = _cheapest(cost, max, len(costs), num_chunks)
    limit *= 1 + 1e-9  # sums of equal chunks may differ by rounding
    _, boundaries = _cheapest(square, lambda before, last: before + last, len(costs), num_chunks)
    return boundaries


def _cheapest(
    cost: Callable[[int, int], float], join: Callable[[float, float], float], num_layers: int, num_chunks: int
) -> tuple[float, list[int]]:
    """The smallest total cost and its boundaries, by dynamic programming.

    Args:
        cost: the cost of a chunk, from its first layer to the layer after its last one.
        join: combines the total of the earlier chunks with the cost of the last chunk.
        num_layers: number of layers.
        num_chunks: number of chunks.
    """
    best: list[tuple[float, list[int]]] = [(cost(0, end), []) for end in range(num_layers + 1)]
    for _ in range(num_chunks - 1):
        best = [
            min(((join(best[cut][0], cost(cut, end)), [*best[cut][1], cut]) for cut in range(end)), default=best[0])
            for end in range(num_layers + 1)
        ]
    return best[-1]


def problem(boundaries: Sequence[int], has_weights: Sequence[bool], num_chunks: int) -> str | None:
    """The message for the rule that given boundaries break; None if they are valid."""
    if len(boundaries) != num_chunks - 1:
        return f"{num_chunks} chunks have {num_chunks - 1} boundaries, not {len(boundaries)}"
    if any(not 0 < boundary < len(has_weights) for boundary in boundaries):
        return f"boundaries are layers from 1 to {len(has_weights) - 1}"
    if any(later <= earlier for earlier, later in pairwise(boundaries)):
        return "boundaries must ascend"
    for chunk in ranges(boundaries, len(has_weights)):
        if not any(has_weights[layer] for layer in chunk):
            return f"the part of layers {chunk.start} to {chunk.stop - 1} has no weights"
    return None


def ranges(boundaries: Sequence[int], num_layers: int) -> list[range]:
    """The layers of each chunk."""
    return [range(start, end) for start, end in pairwise([0, *boundaries, num_layers])]
