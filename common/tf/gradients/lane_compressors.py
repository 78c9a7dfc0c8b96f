"""Compression of reproducible runs: lanes take the place of ranks, and those of a rank exchange in lockstep."""

import itertools
import threading
from collections.abc import Mapping, Sequence
from queue import SimpleQueue
from typing import Any

from common.distributed.topology import Topology
from common.gradients.bucketing import Bucket
from common.gradients.compression import RANK_LOCAL_STATE
from common.gradients.gradient_sync import SyncOptions
from common.gradients.lanes import LaneRequests, Node, Request, TreeSum, nodes_of_ranks
from common.tf.gradients.compression import Communicator, Exchanged
from common.tf.gradients.compressor_set import CompressorSet

import horovod.tensorflow as hvd
import numpy as np
import tensorflow as tf


class EndOfExchange(Exception):  # noqa: N818, it only ends a lane's thread
    """An exchange has failed elsewhere."""


class LaneCommunicator(LaneRequests, Communicator):
    """Sends the messages of a lane to the other lanes.

    Args:
        lane: its number.
        num_lanes: number of lanes.

    Attributes:
        requests: what the lane asks for, and at last its result.
        answers: what it gets; None if the exchange has failed.
    """

    def __init__(self, lane: int, num_lanes: int) -> None:
        self.rank, self.size = lane, num_lanes
        self.requests: SimpleQueue[Any] = SimpleQueue()
        self.answers: SimpleQueue[tf.Tensor] = SimpleQueue()
        self.begin()

    def _ask(self, request: Request) -> tf.Tensor:
        self.requests.put(request)
        if (answer := self.answers.get()) is None:
            raise EndOfExchange
        return answer


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
        shapes: the shapes of the gradients, in the model's order.
        buckets: the buckets that are exchanged.
        topology: the place of this rank, and the number of lanes.
        options: the compression and the seed.

    Attributes:
        num_bytes: for each bucket, the bytes that this rank has sent in its last exchange.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], buckets: Sequence[Bucket], topology: Topology, options: SyncOptions
    ) -> None:
        self._topology, self._buckets, self._options = topology, buckets, options
        self._sets = [_OfLane(lane, shapes, buckets, topology, options) for lane in topology.batch_slices]
        self._nodes = nodes_of_ranks(topology)
        self.num_bytes = dict.fromkeys(range(len(buckets)), 0)
        self._results: dict[int, list[Exchanged]] = {}  # by bucket, those of each lane
        # By bucket and name, (lanes, n) the states that differ between lanes. Those of other ranks' lanes are old
        # until gather() is called.
        self._rows = {
            (number, name): tf.Variable(tf.zeros([topology.num_lanes, sum(compressor.group.lengths)]), trainable=False)
            for number, compressor in self._sets[0].lossy.items()
            for name in compressor.state
            if name in RANK_LOCAL_STATE
        }

    def compresses(self, number: int, num_steps: int) -> bool:
        """Whether a bucket is compressed in the step after num_steps steps."""
        return number in self._sets[0].lossy and bool(self._options.compresses_at(num_steps))

    def exchange(self, number: int, vectors: Sequence[tf.Tensor], num_steps: int) -> tf.Tensor:
        """Sums a bucket over all lanes.

        Args:
            number: the number of the bucket.
            vectors: for each lane of this rank, its gradients (n,).
            num_steps: number of steps so far.
        """
        self._take_state(number)
        self.num_bytes[number] = 0
        for of_lane, values in zip(self._sets, vectors, strict=True):
            threading.Thread(target=_run, args=(of_lane, number, values, num_steps), daemon=True).start()
        lanes: list[Any] = [of_lane.lossy[number].group.communicator for of_lane in self._sets]
        try:
            self._results[number] = self._in_lockstep(number, lanes)
        except BaseException:
            for lane in lanes:
                lane.answers.put(None)
            raise
        return self._results[number][0].summed

    def _in_lockstep(self, number: int, lanes: Sequence[LaneCommunicator]) -> list[Exchanged]:
        """Answers the lanes until they have their results."""
        for message in itertools.count(1):
            requests = [lane.requests.get() for lane in lanes]
            if errors := [request for request in requests if isinstance(request, BaseException)]:
                raise errors[0]
            if isinstance(requests[0], Exchanged):
                return requests
            answers = self._answered(number, f"lanes.{number}.{message}", requests)
            for lane, answer in zip(lanes, answers, strict=True):
                lane.answers.put(answer)
        raise AssertionError("unreachable")

    def commit(self) -> None:
        """Makes the next states the current ones."""
        for number, results in self._results.items():
            for of_lane, result in zip(self._sets, results, strict=True):
                compressor = of_lane.lossy[number]
                for variable, new in zip(compressor.variables, result.state, strict=True):
                    variable.assign(new)
                for name, value in compressor.state.items():
                    if (number, name) in self._rows:
                        self._rows[number, name][of_lane.lane].assign(value)
        self._results.clear()

    def apply_momentum(self, gradients: list[tf.Tensor], is_skipped: tf.Tensor) -> list[tf.Tensor]:
        """With DGC, the gradients in which those that are not compressed have their momentum."""
        momentum = self._sets[0].momentum
        return momentum.apply(gradients, is_skipped) if momentum else gradients

    def gather(self) -> None:
        """Gives each rank the states of all lanes."""
        mine = self._topology.batch_slices
        for (number, name), rows in self._rows.items():
            rows.assign(hvd.allgather(rows[mine.start : mine.stop], name=f"lanes.state.{number}.{name}"))

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The states by name, such as residual.lane3, and index of the variable."""
        common = self._sets[0].state()
        state = {name: tensors for name, tensors in common.items() if name not in RANK_LOCAL_STATE}
        for (number, name), rows in self._rows.items():
            for lane in range(self._topology.num_lanes):
                parts = self._sets[0].lossy[number].group.split(rows[lane])
                members = zip(self._buckets[number].members, parts, strict=True)
                state.setdefault(f"{name}.lane{lane}", {}).update(members)
        return state

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Loads the result of state()."""
        for (number, name), rows in self._rows.items():
            members = self._buckets[number].members
            for lane in range(self._topology.num_lanes):
                parts = [state[f"{name}.lane{lane}"][index].reshape(-1) for index in members]
                rows[lane].assign(np.concatenate(parts))
        first = self._sets[0]
        local = {name: by_index for name, by_index in first.state().items() if name in RANK_LOCAL_STATE}
        arrays = {name: {index: each.numpy() for index, each in by_index.items()} for name, by_index in local.items()}
        first.load({**state, **arrays})

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the state that a rank takes from another one."""
        return [*self._rows.values(), *self._sets[0].variables]

    def _take_state(self, number: int) -> None:
        first = self._sets[0].lossy[number]
        for of_lane in self._sets:
            compressor = of_lane.lossy[number]
            for name, value in compressor.state.items():
                is_of_lane = (number, name) in self._rows
                source = self._rows[number, name][of_lane.lane] if is_of_lane else first.state[name]
                for mine, new in zip(tf.nest.flatten(value), tf.nest.flatten(source), strict=True):
                    mine.assign(new)

    def _answered(self, number: int, name: str, requests: Sequence[Request]) -> list[tf.Tensor]:
        """What each lane of this rank gets."""
        values = [request.values for request in requests]
        if requests[0].kind == "alltoall":
            return self._alltoall(number, name, tf.stack(values))
        if requests[0].kind == "allgather":
            return [self._allgather(number, name, tf.concat(values, 0))] * len(values)
        if requests[0].kind == "broadcast":
            return [hvd.broadcast(values[0], 0, name=name)] * len(values)
        tree, whole = (TreeSum[tf.Tensor](self._topology.num_lanes, tf.add) for _ in range(2))
        for of_lane, value in zip(self._sets, values, strict=True):
            tree.push(Node(of_lane.lane, of_lane.lane + 1), value)
        received = self._allgather(number, name, tf.stack([value for _, value in tree.nodes]))
        for node, value in zip((node for of_rank in self._nodes for node in of_rank), received, strict=True):
            whole.push(node, value)
        ((_, summed),) = whole.nodes
        return [summed] * len(values)

    def _allgather(self, number: int, name: str, values: tf.Tensor) -> tf.Tensor:
        self.num_bytes[number] += values.numpy().nbytes * (self._topology.world_size - 1)
        return hvd.allgather(values, name=name)

    def _alltoall(self, number: int, name: str, rows: tf.Tensor) -> list[tf.Tensor]:
        """Rows (own lanes, lanes, ...) -> for each own lane, (lanes, ...) the rows from all lanes."""
        of_ranks = [self._topology.lanes_of(rank) for rank in range(self._topology.world_size)]
        own, shape = len(self._sets), rows.shape[2:]
        message = tf.concat([tf.reshape(rows[:, lanes.start : lanes.stop], [-1, *shape]) for lanes in of_ranks], 0)
        splits = [own * len(lanes) for lanes in of_ranks]
        self.num_bytes[number] += shape.num_elements() * rows.dtype.size * (len(message) - own**2)
        received, sizes = hvd.alltoall(message, splits, name=name)
        parts = [tf.reshape(part, [-1, own, *shape]) for part in tf.split(received, sizes)]
        return tf.unstack(tf.concat(parts, 0), axis=1)


def _run(of_lane: _OfLane, number: int, values: tf.Tensor, num_steps: int) -> None:
    """Exchanges a lane's gradients in a thread: between its requests, other lanes run."""
    compressor = of_lane.lossy[number]
    communicator: Any = compressor.group.communicator
    try:
        communicator.begin()
        communicator.requests.put(compressor.exchange(values, tf.constant(num_steps, tf.int32)))
    except BaseException as error:
        communicator.requests.put(error)
