"""Sums gradients to the same bits for all numbers of ranks."""

from collections.abc import Iterable
from functools import partial

from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.gradient_sync import SyncOptions
from common.gradients.lanes import LaneExchange, Node, TreeSum
from common.gradients.step_metrics import StepMetrics
from common.torch.gradients import norms
from common.torch.gradients.buckets import BucketBuffers
from common.torch.gradients.lane_compressors import LaneCompressors
from common.torch.gradients.loss_scaler import LossScaler

import horovod.torch as hvd
import torch
from torch import Tensor, nn


class LaneSync(LaneExchange):
    """Sums the gradients of lanes along one tree (common/gradients/lanes.py): the GradientSync of reproducible runs.

    A rank computes its lanes one after another, and each lane's gradients are kept apart. Then each rank adds up one
    part of the vectors of all lanes, so that it sends about as much as in an allreduce.

    Args:
        weights: the parameters of the model, in order, with their names. Frozen parameters are ignored.
        topology: the place of this rank, and the number of lanes.
        options: how gradients are summed. Each lane has compressors of its own.

    Attributes:
        buckets: the vectors in which gradients are exchanged.
    """

    _scaler: LossScaler

    def __init__(self, weights: Iterable[tuple[str, nn.Parameter]], topology: Topology, options: SyncOptions) -> None:
        self._topology, self.options, self._scaler = topology, options, LossScaler(options)
        self._parameters = [parameter for _, parameter in weights if parameter.requires_grad]
        shapes = [tuple(parameter.shape) for parameter in self._parameters]
        value_bytes = self._parameters[0].element_size()
        self.buckets = bucketing.of_model(shapes, value_bytes, options.compression, options.op, options.bucket_bytes)
        self._buffers = BucketBuffers(self._parameters, self.buckets)
        self.lengths = list(map(len, self._buffers.messages))
        self._compressors = LaneCompressors(self._parameters, self.buckets, topology, options)
        self._local_clip_norm = options.local_clip_norm(topology.num_lanes)
        self._sums: list[TreeSum[Tensor]] = []
        self._kept: dict[int, list[Tensor]] = {}  # by bucket that is compressed in this step, the vectors of the lanes

    def zero(self) -> None:
        """Starts a step: clears all gradients."""
        self._clear()
        self._sums = [self._tree() for _ in self.buckets]
        is_on = partial(self._compressors.compresses, num_steps=self._scaler.num_steps)
        self._kept = {number: [] for number in range(len(self.buckets)) if is_on(number)}

    def end_lane(self, lane: int, loss: Tensor | float, stop: float, fraction: float) -> None:
        """Takes the gradients of a lane, after its backward; the lanes of a rank come in order.

        Args:
            lane: the lane's number.
            loss: the lane's part of the mean loss over the global batch.
            stop: this rank's notice to the others (common/training/preemption.py).
            fraction: the lane's fraction of the examples of the global batch; 0: it has none, and ran no backward.
        """
        buffers, scalars = self._buffers, self._buffers.scalars
        buffers.mark_present()
        buffers.adopt_all()
        scalars[0], scalars[1] = loss, stop
        scalars[3] = self._scaler.unscale(buffers.values)
        if self.options.finds_nonfinite:
            scalars[3] += float(not torch.as_tensor(loss).isfinite())
        if self._local_clip_norm:
            norms.clip(buffers.values, self._local_clip_norm, norms.norm(buffers.values))
        if self.options.measure_noise and fraction:
            scalars[2] = norms.norm(buffers.values) ** 2 / fraction**2
        for number, (tree, message) in enumerate(zip(self._sums, buffers.messages, strict=True)):
            if number in self._kept:
                self._kept[number].append(message.clone())
            else:
                tree.push(Node(lane, lane + 1), message.clone())
        self._clear()

    def synchronize(self) -> StepMetrics:
        """Sums the gradients of all lanes; returns the metrics of the step, the same on all ranks."""
        self._exchange()
        squared_norm = norms.norm(self._buffers.values) ** 2 if self.options.measure_noise else 0.0
        if not (self.options.finds_nonfinite and self._buffers.scalars[3] > 0):
            self._compressors.commit(self._scaler.num_steps)
            self._compressors.apply_momentum()
        compressed = {number: self._compressors.num_bytes[number] for number in self._kept}
        value_bytes = self._buffers.scalars.element_size()
        return self.counted(self._buffers.scalars.unbind(), squared_norm, value_bytes, compressed)

    def clip_norm(self, max_norm: float) -> None:
        """Scales the summed gradients down to a global L2 norm of max_norm if theirs is larger; 0: no clipping.

        With error feedback this does nothing, because each lane was clipped before the exchange.
        """
        if max_norm and not self._local_clip_norm:
            norms.clip(self._buffers.values, max_norm, norms.norm(self._buffers.values))

    def sync_weights(self) -> None:
        """Does nothing: all ranks make the same updates, so that each has the newest weights."""

    def gather_state(self) -> None:
        """Gives each rank the states of all lanes' compressors."""
        self._compressors.gather()

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The state of the lanes' compressors, by name and index of the parameter; the tensors are views."""
        return self._compressors.state()

    def _clear(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None
        self._buffers.scalars.zero_()

    def _tree(self) -> TreeSum[Tensor]:
        return TreeSum(self._topology.num_lanes, Tensor.add_)

    def _exchange(self) -> None:
        """Sums each bucket's vectors of all lanes."""
        sent = {number: self._send(number) for number in range(len(self.buckets)) if number not in self._kept}
        parts = {number: self._part(number, hvd.synchronize(handle)[0]) for number, handle in sent.items()}
        gathered = {number: hvd.allgather_async(part, name=f"lanes.sums.{number}") for number, part in parts.items()}
        num_steps = self._scaler.num_steps
        sums = {number: self._compressors.exchange(number, kept, num_steps) for number, kept in self._kept.items()}
        self._buffers.adopt_all()
        self._buffers.receive(sums | {number: hvd.synchronize(handle) for number, handle in gathered.items()})

    def _send(self, number: int) -> int:
        """Sends to each rank its part of this rank's nodes."""
        nodes, parts = self._sums[number].nodes, self.parts(number)
        message = torch.cat([value[start:end] for start, end in parts for _, value in nodes])
        splits = torch.tensor([len(nodes) * (end - start) for start, end in parts], dtype=torch.int32)
        return hvd.alltoall_async(message, splits, name=f"lanes.nodes.{number}")

    def _part(self, number: int, received: Tensor) -> Tensor:
        """This rank's part of the sum of all lanes; received are its parts of all nodes, in the order of the ranks."""
        nodes, tree = [node for of_rank in self.nodes for node in of_rank], self._tree()
        start, end = self.parts(number)[self._topology.rank]
        for node, value in zip(nodes, received.view(len(nodes), end - start), strict=True):
            tree.push(node, value)
        ((_, part),) = tree.nodes
        return part
