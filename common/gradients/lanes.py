"""A sum whose bits do not depend on the number of ranks.

The global batch is cut into a fixed number of lanes. Floating-point addition is not associative, so the gradients of
the lanes are always added along the same binary tree, whichever rank has computed which lane. Node i of a level is the
sum of the nodes 2i and 2i + 1 of the level below; where there is no second one, it is the first one.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

from common.distributed.topology import Topology, bounds, lanes_of
from common.gradients.gradient_sync import CountedSync
from common.gradients.step_metrics import StepMetrics

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


def nodes_of_ranks(topology: Topology) -> list[Sequence[Node]]:
    """For each rank, the nodes that it is left with."""
    return [nodes_of(rank, topology.world_size, topology.num_lanes) for rank in range(topology.world_size)]


class Request(NamedTuple):
    """What a lane asks the other lanes for; it is answered when all lanes of its rank have asked.

    Attributes:
        kind: allreduce, alltoall, allgather or broadcast.
        values: the lane's message.
    """

    kind: str
    values: Any


class LaneRequests:
    """What the LaneCommunicator of both bindings does alike: its messages are requests to the other lanes."""

    def allreduce(self, values: Any) -> Any:
        """The sum over the lanes, along their tree."""
        return self._ask(Request("allreduce", values))

    def alltoall(self, rows: Any) -> Any:
        """Row l of (lanes, ...) goes to lane l; row l of the result comes from lane l."""
        return self._ask(Request("alltoall", rows))

    def allgather(self, values: Any) -> Any:
        """The values (k, ...) of all lanes, one after another."""
        return self._ask(Request("allgather", values))

    def broadcast(self, values: Any) -> Any:
        """The values of lane 0."""
        return self._ask(Request("broadcast", values))

    def _ask(self, request: Request) -> Any:
        return request


class LaneExchange(CountedSync):
    """What the LaneSync of both bindings knows: which rank sends which nodes of which part of a vector.

    Each rank adds up one part of the vectors of all lanes. So it sends each other rank that one's part of its nodes,
    and then all ranks the sum of its own part.

    Attributes:
        lengths: for each bucket, the number of values of its vector.
    """

    lengths: Sequence[int]

    @cached_property
    def nodes(self) -> list[Sequence[Node]]:
        """For each rank, the nodes that it sends."""
        return nodes_of_ranks(self._topology)

    def parts(self, number: int) -> list[tuple[int, int]]:
        """Where each rank's part of a bucket's vector begins and ends."""
        return list(pairwise(bounds(self.lengths[number], self._topology.world_size)))

    def wire_bytes(self, value_bytes: int) -> list[int]:
        """The bytes that this rank sends in a step, for each bucket, without compression."""
        rank, num_others = self._topology.rank, self._topology.world_size - 1
        mine = [end - start for start, end in (self.parts(number)[rank] for number in range(len(self.lengths)))]
        return [
            value_bytes * (len(self.nodes[rank]) * (whole - part) + num_others * part)
            for whole, part in zip(self.lengths, mine, strict=True)
        ]

    def counted(
        self, scalars: Sequence[Any], squared_norm: Any, value_bytes: int, compressed: Mapping[int, Any]
    ) -> StepMetrics:
        """Counts a step; returns its metrics.

        Args:
            scalars: the summed scalars of the last bucket.
            squared_norm: () the squared norm of the summed gradients.
            value_bytes: bytes of one value.
            compressed: for each compressed bucket, by its number, the bytes that this rank has sent.
        """
        wire_bytes = dict(enumerate(self.wire_bytes(value_bytes))) | dict(compressed)
        loss, stop, local_grad_sqnorm, overflow = scalars
        loss_scale = self._scaler.counters.loss_scale
        self._scaler.count(overflow > 0 if self.options.finds_nonfinite else False)
        return StepMetrics(
            loss,
            stop,
            local_grad_sqnorm,
            overflow,
            squared_norm,
            tuple(wire_bytes.values()),
            loss_scale=loss_scale,
            skipped_steps=self._scaler.counters.skipped_steps,
        )
