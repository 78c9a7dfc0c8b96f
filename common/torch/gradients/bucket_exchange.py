"""Exchanges gradients while backward still runs."""

import math
from collections.abc import Collection, Mapping
from functools import partial

from common.config.schema import LossyConfig
from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients import bucketing
from common.gradients.gradient_sync import SyncOptions
from common.torch.gradients import norms
from common.torch.gradients.buckets import BucketBuffers
from common.torch.gradients.compression import Adasum, Exchanges
from common.torch.gradients.compressor_set import CompressorSet
from common.torch.gradients.health_probe import HealthProbe
from common.torch.gradients.loss_scaler import LossScaler

from torch import Tensor, nn


class BucketExchange:
    """Sends each bucket of gradients as soon as backward has finished it.

    A single rank that does not compress exchanges nothing, and has no buffers.

    Args:
        parameters: the trained parameters by name, in the model's order.
        topology: the place of this rank; the ranks of its group exchange gradients.
        options: how gradients are summed.
        scaler: unscales gradients before they are sent.
        probe: measures the health of the compression.
        tied: parameters that stages share; they are never compressed.

    Attributes:
        names: the names of the trained parameters.
        parameters: the trained parameters.
        buckets: the parameters of each bucket.
        buffers: the memory of the buckets.
        compressors: sum the buckets.
        local_clip_norm: largest norm of this rank's part of the gradients before the exchange; 0: not clipped there.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        topology: Topology,
        options: SyncOptions,
        scaler: LossScaler,
        probe: HealthProbe,
        tied: Collection[nn.Parameter],
    ) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self._options, self._scaler, self._probe = options, scaler, probe
        numbers = {parameter: index for index, parameter in enumerate(self.parameters)}
        self.buckets = bucketing.of_model(
            [tuple(parameter.shape) for parameter in self.parameters],
            self.parameters[0].element_size(),
            options.compression,
            options.op,
            options.bucket_bytes,
            [numbers[parameter] for parameter in tied if parameter in numbers],
        )
        is_exchanged = len(topology.group) > 1 or isinstance(options.compression, LossyConfig)
        exchanged = self.buckets if is_exchanged else []
        self.buffers = BucketBuffers(self.parameters, exchanged)
        self.compressors = CompressorSet(self.parameters, exchanged, topology, options)
        self.local_clip_norm = options.local_clip_norm(topology.world_size)
        self._hooks = [
            self.parameters[index].register_post_accumulate_grad_hook(partial(self._finished_one, index, number))
            for index, number in sorted(self.buffers.bucket_of.items())
        ]
        self._exchanges = Exchanges()
        self._is_last_backward, self._local_batch_fraction, self._scale = False, 0.0, 1.0
        self._unfinished: list[set[int]] = []  # for each bucket, the gradients that the last backward has not finished
        self._sent: set[int] = set()
        self._changed_late: set[int] = set()  # gradients that backward changed after their bucket was sent

    def remove_hooks(self) -> None:
        """Lets the parameters go, so that another exchange can have them."""
        for hook in self._hooks:
            hook.remove()

    @property
    def values(self) -> list[Tensor]:
        """All gradients: one tensor per bucket, or one per parameter if there are no buckets."""
        return self.buffers.values or [each.grad for each in self.parameters if each.grad is not None]

    def begin(self, loss: Tensor | float, stop: float, local_batch_fraction: float, scale: float) -> None:
        """Lets the next backward send each bucket; for the arguments see AllreduceSync.prepare_for_backward()."""
        scalars = self.buffers.scalars
        scalars[0], scalars[1] = loss, stop
        if self._options.finds_nonfinite:
            scalars[3] += float(not math.isfinite(loss))
        self._local_batch_fraction, self._scale = local_batch_fraction, scale
        self._unfinished = [set(bucket.members) for bucket in self.buckets]
        self._is_last_backward = True

    def finish(self) -> tuple[list[Tensor], list[int]]:
        """Sends buckets that backward has not sent, and waits for all.

        Returns:
            For each bucket, this rank's compression error, and the number of bytes that it has sent.

        Raises:
            TrainingError: backward has changed a gradient after its bucket was sent.
        """
        self._is_last_backward = False
        num_buckets = len(self.buffers.values)
        if num_buckets and num_buckets - 1 not in self._sent:
            self.buffers.mark_present()
        self.buffers.fill_absent()
        if self.local_clip_norm:
            norms.clip(self.values, self.local_clip_norm * self._scaler.counters.loss_scale, norms.norm(self.values))
        for number in range(num_buckets):
            if number not in self._sent:
                self._send(number)
        if not num_buckets:
            self.buffers.scalars[3] += self._scaler.unscale(self.values)
        results = self._exchanges.finish()
        self._sent.clear()
        self.buffers.receive({number: summed for number, (summed, _) in results.items()})
        self._check_order()
        num_steps = self._scaler.num_steps
        wire_bytes = [self.compressors.at(number, num_steps).num_bytes for number in range(num_buckets)]
        return [error for _, error in results.values()], wire_bytes

    def _finished_one(self, index: int, number: int, _: nn.Parameter) -> None:
        """Hook after backward has added to a parameter's gradient: moves it into its bucket, and sends full buckets."""
        self.buffers.adopt(index)
        if not self._is_last_backward:
            return
        if number in self._sent:
            self._changed_late.add(index)
        self._unfinished[number].discard(index)
        # The last bucket is sent last: it carries the overflow flag and the squared norms of all other buckets. To
        # clip before the exchange, all gradients are needed, so nothing is sent here.
        is_last_too_early = number == len(self.buckets) - 1 and len(self._sent) < number
        is_ready = not self._unfinished[number] and not is_last_too_early and number not in self._sent
        if is_ready and not self.local_clip_norm:
            self.buffers.mark_all_present()  # used by the last bucket, when all others are sent
            self._send(number)

    def _send(self, number: int) -> None:
        values, scalars, fraction = self.buffers.values[number], self.buffers.scalars, self._local_batch_fraction
        if not self._scale:
            values.zero_()  # also where a value is not finite
        elif self._scale != 1:
            values *= self._scale
        if self._options.finds_nonfinite:
            scalars[3] += self._scaler.unscale([values])
        if self._options.measure_noise and fraction:
            # These gradients are sums over this rank's examples, divided by the global batch size.
            scalars[2] += norms.norm([values]) ** 2 / fraction**2
        compressor = self.compressors.at(number, self._scaler.num_steps)
        if isinstance(compressor, Adasum) and fraction:
            values /= fraction
        self._sent.add(number)
        if self._options.measures_health:
            self._probe.keep(number, values)
        compressor.group.communicator.begin()
        self._exchanges.start(number, compressor.exchange(self.buffers.messages[number], self._scaler.num_steps))

    def _check_order(self) -> None:
        if self._changed_late:
            names = ", ".join(self.names[index] for index in sorted(self._changed_late))
            self._changed_late.clear()
            raise TrainingError(
                f"backward added to the gradients of {names} after they had left for the other ranks: a parameter "
                "was used by several backward passes, or by reentrant checkpointing of a shared layer; call "
                "prepare_for_backward() before the last pass alone, and use checkpointing with use_reentrant=False"
            )
