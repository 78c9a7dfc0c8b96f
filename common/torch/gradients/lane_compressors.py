"""Compression of reproducible runs: lanes take the place of ranks, and those of a rank exchange in lockstep."""

import itertools
from collections.abc import Sequence
from typing import Any

from common.distributed.topology import Topology
from common.gradients.bucketing import Bucket
from common.gradients.compression import RANK_LOCAL_STATE
from common.gradients.gradient_sync import SyncOptions
from common.gradients.lanes import LaneRequests, Node, Request, TreeSum, nodes_of_ranks
from common.torch.gradients.compression import Communicator
from common.torch.gradients.compressor_set import CompressorSet

import horovod.torch as hvd
import torch
from torch import Tensor


class LaneCommunicator(LaneRequests, Communicator):
    """Sends the messages of a lane to the other lanes."""

    def __init__(self, lane: int, num_lanes: int) -> None:
        self.rank, self.size = lane, num_lanes
        self.begin()


class _OfLane(CompressorSet):
    """The compressors of one lane."""

    def __init__(self, lane: int, *args: Any) -> None:
        self.lane = lane
        super().__init__(*args)

    def _communicator(self, name: str, ranks: Sequence[int]) -> Communicator:
        return LaneCommunicator(self.lane, self._topology.num_lanes)


class LaneCompressors:
    """The compressors of a rank's lanes.

    Args:
        parameters: the trained parameters, in the model's order.
        buckets: the buckets that are exchanged.
        topology: the place of this rank, and the number of lanes.
        options: the compression and the seed.

    Attributes:
        num_bytes: for each bucket, the bytes that this rank has sent in its last exchange.
    """

    def __init__(
        self, parameters: Sequence[Tensor], buckets: Sequence[Bucket], topology: Topology, options: SyncOptions
    ) -> None:
        self._topology, self._buckets = topology, buckets
        self._sets = [_OfLane(lane, parameters, buckets, topology, options) for lane in topology.batch_slices]
        self._nodes = nodes_of_ranks(topology)
        self.num_bytes = dict.fromkeys(range(len(buckets)), 0)
        # By bucket and name, (lanes, n) the states that differ between lanes. Those of other ranks' lanes are old
        # until gather() is called.
        self._rows = {
            (number, name): value.new_zeros(topology.num_lanes, len(value))
            for number, compressor in self._sets[0].lossy.items()
            for name, value in compressor.state.items()
            if name in RANK_LOCAL_STATE
        }

    def compresses(self, number: int, num_steps: int) -> bool:
        """Whether a bucket is compressed in the step after num_steps steps."""
        compressor = self._sets[0].lossy.get(number)
        return compressor is not None and self._sets[0].at(number, num_steps) is compressor

    def exchange(self, number: int, vectors: Sequence[Tensor], num_steps: int) -> Tensor:
        """Sums a bucket over all lanes.

        Args:
            number: the number of the bucket.
            vectors: for each lane of this rank, its gradients (n,); may be overwritten.
            num_steps: number of steps so far.
        """
        self._take_state(number)
        self.num_bytes[number] = 0
        exchanges = [
            of_lane.lossy[number].exchange(values, num_steps)
            for of_lane, values in zip(self._sets, vectors, strict=True)
        ]
        requests: list[Any] = [next(exchange) for exchange in exchanges]
        for message in itertools.count(1):
            answers = self._answered(number, f"lanes.{number}.{message}", requests)
            requests, results = [], []
            for exchange, answer in zip(exchanges, answers, strict=True):
                try:
                    requests.append(exchange.send(answer))
                except StopIteration as stop:
                    results.append(stop.value)
            if results:
                break
        summed: Tensor = results[0][0]
        return summed

    def commit(self, num_steps: int) -> None:
        """Makes the next states the current ones."""
        for of_lane in self._sets:
            of_lane.commit(num_steps)
        for (number, name), rows in self._rows.items():
            for of_lane in self._sets:
                rows[of_lane.lane] = of_lane.lossy[number].state[name]

    def apply_momentum(self) -> None:
        """With DGC, gives the gradients that are not compressed their momentum."""
        if self._sets[0].momentum:
            self._sets[0].momentum.apply()

    def gather(self) -> None:
        """Gives each rank the states of all lanes."""
        mine = self._topology.batch_slices
        for (number, name), rows in self._rows.items():
            rows.copy_(hvd.allgather(rows[mine.start : mine.stop], name=f"lanes.state.{number}.{name}"))

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The states by name, such as residual.lane3, and index of the parameter; the tensors are views."""
        common = self._sets[0].state()
        state = {name: tensors for name, tensors in common.items() if name not in RANK_LOCAL_STATE}
        for (number, name), rows in self._rows.items():
            for lane, row in enumerate(rows):
                parts = self._sets[0].lossy[number].group.split(row)
                members = zip(self._buckets[number].members, parts, strict=True)
                state.setdefault(f"{name}.lane{lane}", {}).update(members)
        return state

    def _take_state(self, number: int) -> None:
        first = self._sets[0].lossy[number]
        for of_lane in self._sets:
            compressor = of_lane.lossy[number]
            for name, value in compressor.state.items():
                if (number, name) in self._rows:
                    value.copy_(self._rows[number, name][of_lane.lane])
                elif compressor is not first:
                    for mine, of_first in zip(value, first.state[name], strict=True):
                        mine.copy_(of_first)

    def _answered(self, number: int, name: str, requests: Sequence[Request]) -> list[Tensor]:
        """What each lane of this rank gets."""
        values = [request.values for request in requests]
        if requests[0].kind == "alltoall":
            return self._alltoall(number, name, torch.stack(values))
        if requests[0].kind == "allgather":
            return [self._allgather(number, name, torch.cat(values))] * len(values)
        if requests[0].kind == "broadcast":
            of_first = hvd.broadcast(values[0], 0, name=name)
            return [value.copy_(of_first) for value in values]
        tree = self._tree()
        for of_lane, value in zip(self._sets, values, strict=True):
            tree.push(Node(of_lane.lane, of_lane.lane + 1), value.clone())
        received, whole = self._allgather(number, name, torch.stack([value for _, value in tree.nodes])), self._tree()
        for node, value in zip((node for of_rank in self._nodes for node in of_rank), received, strict=True):
            whole.push(node, value)
        ((_, summed),) = whole.nodes
        return [summed] * len(values)

    def _tree(self) -> TreeSum[Tensor]:
        return TreeSum(self._topology.num_lanes, Tensor.add_)

    def _allgather(self, number: int, name: str, values: Tensor) -> Tensor:
        self.num_bytes[number] += values.nbytes * (self._topology.world_size - 1)
        gathered: Tensor = hvd.allgather(values, name=name)
        return gathered

    def _alltoall(self, number: int, name: str, rows: Tensor) -> list[Tensor]:
        """Rows (own lanes, lanes, ...) -> for each own lane, (lanes, ...) the rows from all lanes."""
        of_ranks = [self._topology.lanes_of(rank) for rank in range(self._topology.world_size)]
        message = torch.cat([rows[:, lanes.start : lanes.stop].flatten(0, 1) for lanes in of_ranks])
        splits = torch.tensor([len(rows) * len(lanes) for lanes in of_ranks], dtype=torch.int32)
        self.num_bytes[number] += message[0].nbytes * (len(message) - len(rows) ** 2)
        received, sizes = hvd.alltoall(message, splits, name=name)
        parts = [part.unflatten(0, (-1, len(rows))) for part in received.split(sizes.tolist())]
        return list(torch.cat(parts).transpose(0, 1).contiguous())
