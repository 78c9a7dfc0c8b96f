"""The compressors of a model's buckets."""

from collections.abc import Sequence

from common.config.schema import DGCConfig, LossyConfig, ReduceOp
from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.bucketing import Bucket
from common.gradients.gradient_sync import NO_COMPRESSION, SyncOptions
from common.torch.distributed import runtime
from common.torch.gradients import compression
from common.torch.gradients.compression import Adasum, Communicator, CompressionGroup, Compressor, Dense, PlainMomentum

from torch import Tensor


class CompressorSet:
    """One compressor per bucket, the uncompressed sum that precedes it, and with DGC the momentum of the other weights.

    Args:
        parameters: the trained parameters, in the model's order.
        buckets: the buckets that are exchanged.
        topology: the place of this rank; the ranks of its group exchange gradients.
        options: the compression, the operation and the seed.

    Attributes:
        lossy: the compressors of buckets that are not simply summed, by number.
    """

    def __init__(
        self, parameters: Sequence[Tensor], buckets: Sequence[Bucket], topology: Topology, options: SyncOptions
    ) -> None:
        self._buckets, self._topology, self._options = buckets, topology, options
        self._plain: list[Compressor] = []
        self.lossy: dict[int, Compressor] = {}
        for number, bucket in enumerate(buckets):
            shapes = [tuple(parameters[index].shape) for index in bucket.members]
            communicator = self._communicator(f"{options.name}.{number}", topology.group)
            group = CompressionGroup(number, shapes, communicator, options.seed, parameters[0].device)
            self._plain.append(Dense(NO_COMPRESSION, group))
            if bucket.method == ReduceOp.adasum.name:
                self.lossy[number] = Adasum(NO_COMPRESSION, group)
            elif isinstance(options.compression, LossyConfig) and bucket.method != NO_COMPRESSION.name:
                self.lossy[number] = self._lossy(options.compression, group)
        self.momentum: PlainMomentum | None = None
        if isinstance(options.compression, DGCConfig) and options.compression.momentum:
            others = bucketing.members_without(options.compression.name, buckets)
            self.momentum = PlainMomentum(options.compression.momentum, {index: parameters[index] for index in others})

    def _lossy(self, cfg: LossyConfig, plain: CompressionGroup) -> Compressor:
        ranks: Sequence[int] = self._topology.first_ranks_of_hosts if cfg.two_level else self._topology.group
        communicator = self._communicator(f"{self._options.name}.{plain.number}.{cfg.name}", ranks)
        group = CompressionGroup(plain.number, plain.shapes, communicator, plain.seed, plain.device)
        return compression.build(cfg, group, self._topology)

    def _communicator(self, name: str, ranks: Sequence[int]) -> Communicator:
        return Communicator(name, runtime.process_set(ranks))

    def at(self, number: int, num_steps: int) -> Compressor:
        """The compressor that sums a bucket in the step after num_steps steps."""
        is_on = number in self.lossy and self._options.compresses_at(num_steps)
        return self.lossy[number] if is_on else self._plain[number]

    def commit(self, num_steps: int) -> None:
        """Makes the next state of those that were used after num_steps steps the current one."""
        for number, compressor in self.lossy.items():
            if self.at(number, num_steps) is compressor:
                compressor.commit()

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The state by name and index of the parameter; the tensors are views."""
        state: dict[str, dict[int, Tensor]] = {}
        for number, compressor in self.lossy.items():
            for name, tensors in compressor.state_by_gradient().items():
                state.setdefault(name, {}).update(zip(self._buckets[number].members, tensors, strict=True))
        return state | ({"momentum": self.momentum.velocities} if self.momentum else {})
