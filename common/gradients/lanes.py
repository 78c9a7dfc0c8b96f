"""A sum whose bits do not depend on the number of ranks.

The global batch is cut into a fixed number of lanes. Floating-point addition is not associative, so the gradients of
the lanes are always added along the same binary tree, whichever rank has computed which lane. Node i of a level is the
sum of the nodes 2i and 2i + 1 of the level below; where there is no second one, it is the first one.
"""

from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, TypeVar

from common.distributed.topology import lanes_of

V = TypeVar("V")


class Node(NamedTuple):
    """A node of the tree: the sum of the lanes from start to end."""

    start: int
    end: int


class TreeSum(Generic[V]):
    """Adds the values of lanes up along the tree, in the order of the lanes, as early as it can.

    So it keeps at most one value per level of the tree.

    Args:
        num_lanes: number of lanes of the whole tree.
        add: (value, value) -> their sum; may change the first one.

    Attributes:
        nodes: the nodes that could not be added up yet, in order, with their values.
    """

    def __init__(self, num_lanes: int, add: Callable[[V, V], V]) -> None:
        self._num_lanes, self._add = num_lanes, add
        self.nodes: list[tuple[Node, V]] = []

    def push(self, node: Node, value: V) -> None:
        """Adds the next node: a single lane, or one that another rank has added up."""
        self.nodes.append((node, value))
        while len(self.nodes) > 1 and self._are_siblings(self.nodes[-2][0], self.nodes[-1][0]):
            (right, second), (left, first) = self.nodes.pop(), self.nodes.pop()
            self.nodes.append((Node(left.start, right.end), self._add(first, second)))

    def _are_siblings(self, left: Node, right: Node) -> bool:
        size = left.end - left.start
        is_even = left.start % (2 * size) == 0
        return is_even and right.end == min(left.start + 2 * size, self._num_lanes)


def nodes_of(rank: int, num_ranks: int, num_lanes: int) -> Sequence[Node]:
    """The nodes that a rank is left with when it has added up its lanes."""
    tree = TreeSum[None](num_lanes, lambda first, second: None)
    for lane in lanes_of(rank, num_ranks, num_lanes):
        tree.push(Node(lane, lane + 1), None)
    return [node for node, _ in tree.nodes]
