"""Sums gradients over the ranks by allreduce."""

from collections.abc import Iterable, Sequence
from typing import Any

from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients.bucketing import Bucket
from common.gradients.gradient_sync import Allreduce, SyncOptions
from common.torch.gradients import norms
from common.torch.gradients.bucket_exchange import BucketExchange
from common.torch.gradients.health_probe import HealthProbe
from common.torch.gradients.loss_scaler import LossScaler
from common.torch.gradients.stage_sums import StageSums

from torch import Tensor, nn


class AllreduceSync(Allreduce):
    """Sums the gradients of a model over the ranks: the GradientSync of plain, hybrid and compressed training.

    Each rank's loss is a sum over its examples, divided by the number of examples of the global batch. So the sum over
    the ranks is the exact mean, even if ranks have unequal numbers of examples. When backward has finished a
    parameter's gradient, .grad becomes a view of a flat bucket. If no rank has a gradient of a parameter, its .grad
    stays None, so that the optimizer skips it, as on a single rank.

    Args:
        weights: the parameters of the model or of this rank's stage, in order, with or without names. Frozen
            parameters are ignored.
        topology: the place of this rank; the ranks of its group exchange gradients.
        options: how gradients are summed.
        tied: parameters that are shared with other stages, each with all ranks that have it.
    """

    _scaler: LossScaler

    def __init__(
        self,
        weights: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        topology: Topology,
        options: SyncOptions = SyncOptions(),  # noqa: B008 (it is frozen)
        tied: Iterable[tuple[nn.Parameter, Sequence[int]]] = (),
    ) -> None:
        tied = list(tied)
        self._topology, self.options = topology, options
        self._named: dict[str, nn.Parameter] = {}
        for number, each in enumerate(weights):
            name, parameter = each if isinstance(each, tuple) else (f"number {number}", each)
            self._named[name] = parameter
        self._tied = [parameter for parameter, _ in tied]
        self._scaler, self._stages = LossScaler(options), StageSums(topology, tied)
        self._probe = HealthProbe(topology, self._stages)
        trained = {name: parameter for name, parameter in self._named.items() if parameter.requires_grad}
        self._exchange = BucketExchange(trained, topology, options, self._scaler, self._probe, self._tied)

    def close(self) -> None:
        """Lets the parameters go, so that another exchange can have them."""
        self._exchange.remove_hooks()

    @property
    def names(self) -> list[str]:
        """The names of the trained parameters, by their index."""
        return self._exchange.names

    @property
    def gradients(self) -> list[Tensor]:
        """After synchronize(), the sums: one tensor per bucket, or one per parameter if there are no buckets."""
        return self._exchange.values

    @property
    def buckets(self) -> Sequence[Bucket]:
        """The vectors in which gradients are exchanged."""
        return self._exchange.buckets

    def zero(self) -> None:
        """Starts a step: clears all gradients.

        Raises:
            TrainingError: a parameter requires a gradient that was frozen when the buckets were built.
        """
        trained = set(self._exchange.parameters)
        for name, parameter in self._named.items():
            if parameter.requires_grad and parameter not in trained:
                raise TrainingError(
                    f"parameter {name} was frozen and is trained now: its gradient would not be summed over the "
                    "ranks; freeze and unfreeze before the gradients' buckets are made"
                )
            parameter.grad = None
        self._exchange.buffers.scalars.zero_()

    def prepare_for_backward(
        self, loss: Tensor | float = 0.0, stop: float = 0.0, local_batch_fraction: float = 0.0, scale: float = 1.0
    ) -> None:
        """Lets the next backward, the last one of the step, send each bucket as soon as its gradients are finished.

        Args:
            loss: this rank's part of the mean loss over the global batch.
            stop: this rank's notice to the others (common/training/preemption.py).
            local_batch_fraction: this rank's fraction of the examples of the global batch; needed for the noise scale
                and adasum.
            scale: factor on this rank's gradients before they are summed.
        """
        self._exchange.begin(loss, stop, local_batch_fraction, scale)

    def clip_norm(self, max_norm: float) -> None:
        """Scales the summed gradients down to a global L2 norm of max_norm if theirs is larger; 0: no clipping.

        With error feedback this does nothing, because each rank has clipped its part before the exchange.
        """
        if max_norm and not self._exchange.local_clip_norm:
            norms.clip(self._exchange.values, max_norm, self._stages.norm(self._exchange.values))

    def sync_weights(self) -> None:
        """Does nothing: all ranks make the same updates, so that each has the newest weights."""

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The state of this rank's compressors, by name and index of the parameter; the tensors are views."""
        return self._exchange.compressors.state()

    def _finish_buckets(self) -> tuple[list[Tensor], list[int]]:
        return self._exchange.finish()

    def _sum_tied_weights(self) -> None:
        self._stages.sum_tied()

    def _sum_scalars(self) -> Sequence[Tensor]:
        return self._stages.sum("step_sums", self._exchange.buffers.scalars).unbind()

    def _commit(self, is_skipped: Any) -> None:
        if not is_skipped:
            self._exchange.compressors.commit(self._scaler.num_steps)

    def _squared_norm(self) -> Tensor:
        return norms.norm(self._exchange.values) ** 2

    def _health(self, errors: list[Tensor]) -> tuple[float, float]:
        return self._probe.measure(self._exchange.buffers.values, errors)

    def _apply_momentum(self, is_skipped: Any) -> None:
        momentum = self._exchange.compressors.momentum
        if momentum and not is_skipped:
            momentum.apply()
