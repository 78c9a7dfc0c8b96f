"""The compressors of a model's buckets."""

from collections.abc import Mapping, Sequence

from common.config.schema import DGCConfig, LossyConfig, ReduceOp
from common.distributed.topology import Topology
from common.gradients import bucketing
from common.gradients.bucketing import Bucket
from common.gradients.gradient_sync import NO_COMPRESSION, SyncOptions
from common.tf.distributed import runtime
from common.tf.gradients import compression
from common.tf.gradients.compression import (
    Adasum,
    Communicator,
    CompressionGroup,
    Compressor,
    Dense,
    Exchanged,
    PlainMomentum,
)

import numpy as np
import tensorflow as tf


class CompressorSet:
    """One compressor per bucket, the uncompressed sum that precedes it, and with DGC the momentum of the other weights.

    Args:
        shapes: the shapes of the gradients, in the model's order.
        buckets: the buckets that are exchanged.
        topology: the place of this rank; the ranks of its group exchange gradients.
        options: the compression, the operation and the seed.

    Attributes:
        lossy: the compressors of buckets that are not simply summed, by number.
        momentum: with DGC, the momentum of the weights that are not compressed.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], buckets: Sequence[Bucket], topology: Topology, options: SyncOptions
    ) -> None:
        self._buckets, self._topology, self._options = buckets, topology, options
        self._plain: list[Compressor] = []
        self.lossy: dict[int, Compressor] = {}
        for number, bucket in enumerate(buckets):
            communicator = self._communicator(f"{options.name}.{number}", topology.group)
            of_bucket = [shapes[index] for index in bucket.members]
            group = CompressionGroup(number, of_bucket, communicator, options.seed)
            self._plain.append(Dense(NO_COMPRESSION, group))
            if bucket.method == ReduceOp.adasum.name:
                self.lossy[number] = Adasum(NO_COMPRESSION, group)
            elif isinstance(options.compression, LossyConfig) and bucket.method != NO_COMPRESSION.name:
                self.lossy[number] = self._lossy(options.compression, group)
        self.momentum: PlainMomentum | None = None
        if isinstance(options.compression, DGCConfig) and options.compression.momentum:
            others = bucketing.members_without(options.compression.name, buckets)
            self.momentum = PlainMomentum(options.compression.momentum, {index: shapes[index] for index in others})

    def _lossy(self, cfg: LossyConfig, plain: CompressionGroup) -> Compressor:
        ranks: Sequence[int] = self._topology.first_ranks_of_hosts if cfg.two_level else self._topology.group
        communicator = self._communicator(f"{self._options.name}.{plain.number}.{cfg.name}", ranks)
        group = CompressionGroup(plain.number, plain.shapes, communicator, plain.seed)
        return compression.build(cfg, group, self._topology)

    def _communicator(self, name: str, ranks: Sequence[int]) -> Communicator:
        return Communicator(name, runtime.process_set(ranks))

    def exchange(
        self, number: int, flat: tf.Tensor, scalars: tf.Tensor, fraction: tf.Tensor, num_steps: tf.Tensor
    ) -> Exchanged:
        """Sums a bucket over the ranks.

        Args:
            number: the number of the bucket.
            flat: (n,) this rank's gradients.
            scalars: (m,) scalars that are appended to the last bucket.
            fraction: () this rank's fraction of the examples of the global batch; needed for adasum.
            num_steps: () number of steps so far.
        """
        step = tf.cast(num_steps, tf.int32)
        plain, compressor = self._plain[number], self.lossy.get(number)
        plain.group.communicator.begin()
        if compressor is None:
            return plain.exchange(tf.concat([flat, scalars], 0) if number == len(self._buckets) - 1 else flat, step)
        if isinstance(compressor, Adasum):
            return compressor.exchange(tf.math.divide_no_nan(flat, fraction), step)
        compressor.group.communicator.begin()
        if isinstance(self._options.compression, LossyConfig) and self._options.compression.start_step <= 1:
            return compressor.exchange(flat, step)

        def uncompressed() -> Exchanged:
            unchanged = [variable.value() for variable in compressor.variables]
            return plain.exchange(flat, step)._replace(state=unchanged, error=tf.zeros_like(flat))

        return tf.cond(self._options.compresses_at(step), lambda: compressor.exchange(flat, step), uncompressed)

    def commit(self, results: Sequence[Exchanged], is_skipped: tf.Tensor | bool) -> None:
        """Assigns the compressors' next state, unless the step is skipped."""
        for number, compressor in self.lossy.items():
            for variable, new in zip(compressor.variables, results[number].state, strict=True):
                variable.assign(tf.where(is_skipped, variable, new))

    def state(self) -> dict[str, dict[int, tf.Tensor]]:
        """The state by name and index of the variable."""
        state: dict[str, dict[int, tf.Tensor]] = {}
        for number, compressor in self.lossy.items():
            for name, tensors in compressor.state_by_gradient().items():
                state.setdefault(name, {}).update(zip(self._buckets[number].members, tensors, strict=True))
        return state | ({"momentum": self.momentum.state()} if self.momentum else {})

    def load(self, state: Mapping[str, Mapping[int, np.ndarray]]) -> None:
        """Loads the result of state()."""
        for number, compressor in self.lossy.items():
            names, members = compressor.state_by_gradient(), self._buckets[number].members
            compressor.load({name: [state[name][index] for index in members] for name in names})
        if self.momentum:
            self.momentum.load(state["momentum"])

    @property
    def variables(self) -> list[tf.Variable]:
        """The variables of the state."""
        of_momentum = list(self.momentum.velocities.values()) if self.momentum else []
        return [*(one for compressor in self.lossy.values() for one in compressor.variables), *of_momentum]
