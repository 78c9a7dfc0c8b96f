"""Packs gradients into flat buckets and sums them over the replicas while backward still runs."""

import math
from collections.abc import Iterable, Sequence
from functools import partial

from common.config.schema import CompressionConfig, DGCConfig, LossyConfig, ReduceOp
from common.distributed.topology import Topology
from common.errors import TrainingError
from common.gradients import bucketing
from common.gradients.bucketing import Bucket
from common.gradients.compression import local_clip_norm
from common.gradients.loss_scale import LossScale
from common.gradients.step_metrics import NUM_RIDERS, StepMetrics
from common.torch.distributed import runtime
from common.torch.gradients import compression
from common.torch.gradients.compression import (
    Adasum,
    Communicator,
    CompressionGroup,
    Compressor,
    Dense,
    Exchanges,
    PlainMomentum,
)
from common.torch.gradients.norms import norm

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NO_COMPRESSION = CompressionConfig("none")


class Gradients:
    """The gradients of a model, in flat buckets, each of which is exchanged as one vector.

    Each rank's loss is a sum over its examples, divided by the number of examples of the global batch. So the sum over
    the ranks is the exact mean, even if ranks have unequal numbers of examples. When backward has finished a
    parameter's gradient, .grad becomes a view of the bucket; a single rank needs no buckets, unless it compresses. If
    no rank has a gradient of a parameter, its .grad stays None, so that the optimizer skips it, as on a single rank.

    Args:
        parameters: the parameters of the model or of this rank's stage, in order, with or without names. Frozen
            parameters are ignored; after freezing or unfreezing some, call rebuild().
        topology: the place of this rank; the ranks of its group exchange gradients.
        measure_noise: also measures the squared norms that the gradient noise scale needs.
        compression: the compression of the gradients.
        op: how the gradients of the ranks are combined.
        loss_scale: the factor on the losses.
        clip_norm: largest global norm; used with error feedback only, where each rank clips its part before the
            exchange.
        seed: the seed of the compressors' random numbers.
        bucket_bytes: largest size of a bucket that holds several gradients.
        tied: parameters that are shared with other stages, each with all ranks that have it.
        skip_nonfinite: checks for losses and gradients that are not finite and reports them in StepMetrics.overflow.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[tuple[str, nn.Parameter]],
        topology: Topology,
        measure_noise: bool = False,
        compression: CompressionConfig = NO_COMPRESSION,
        op: ReduceOp = ReduceOp.average,
        loss_scale: LossScale | None = None,
        clip_norm: float = 0.0,
        seed: int = 0,
        bucket_bytes: int = bucketing.BUCKET_BYTES,
        tied: Iterable[tuple[nn.Parameter, Sequence[int]]] = (),
        skip_nonfinite: bool = False,
    ) -> None:
        self._topology, self._tied = topology, list(tied)
        self._measure_noise = measure_noise
        named = [pair if isinstance(pair, tuple) else (f"number {n}", pair) for n, pair in enumerate(parameters)]
        self._name_of = {parameter: name for name, parameter in named}
        self._compression, self._op, self._seed, self._bucket_bytes = compression, op, seed, bucket_bytes
        has_feedback = isinstance(compression, LossyConfig) and compression.error_feedback
        self._local_clip_norm = local_clip_norm(clip_norm, topology.world_size) if has_feedback else 0.0
        self.loss_scale = loss_scale or LossScale()
        self._seeks_nonfinite = self.loss_scale.is_dynamic or skip_nonfinite
        self.num_steps = 0
        self._hooks: list[RemovableHandle] = []
        self._build()

    def _build(self) -> None:
        self._parameters = [parameter for parameter in self._name_of if parameter.requires_grad]
        self._frozen = [parameter for parameter in self._name_of if not parameter.requires_grad]
        shapes = [tuple(parameter.shape) for parameter in self._parameters]
        value_bytes = self._parameters[0].element_size()
        numbers = {parameter: index for index, parameter in enumerate(self._parameters)}
        tied = [numbers[parameter] for parameter, _ in self._tied if parameter in numbers]
        self.buckets = bucketing.of_model(shapes, value_bytes, self._compression, self._op, self._bucket_bytes, tied)
        self._messages: list[Tensor] = []
        self._values: list[Tensor] = []  # the part of each message that holds gradients
        self._dense: list[Compressor] = []
        self._compressors: dict[int, Compressor] = {}  # of buckets that are not simply summed
        self._views: list[Tensor] = []  # for each parameter, the part of the bucket for its gradient
        self._waiting: list[set[int]] = []  # for each bucket, the gradients that this backward has not finished
        self._exchanges = Exchanges()
        self._sent: dict[int, Tensor] = {}  # buckets in flight; copies of their values if health is measured
        self._last_backward = False
        self._changed_late: set[int] = set()  # gradients that backward changed after their bucket was sent
        self._riders = self._parameters[0].new_zeros(NUM_RIDERS, requires_grad=False)
        self._holders = self._riders[:0]  # for each gradient, the number of ranks that have it
        if len(self._topology.group) > 1 or isinstance(self._compression, LossyConfig):
            self._make_buckets()
        self._momentum = self._plain_momentum()

    def rebuild(self) -> None:
        """Rebuilds the buckets after freezing or unfreezing parameters; all ranks must call it.

        The compressors' state of parameters that are still trained is kept.

        Raises:
            TrainingError: the ranks train different parameters.
        """
        trained = [name for parameter, name in self._name_of.items() if parameter.requires_grad]
        if any(others != trained for others in runtime.allgather_object(trained)):
            raise TrainingError("the ranks have frozen other parameters than each other; freeze the same ones on all")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        parameters, state = self._parameters, self.state()
        self._build()
        for name, tensors in self.state().items():
            old = {parameters[index]: tensor for index, tensor in state.get(name, {}).items()}
            for index, tensor in tensors.items():
                tensor.copy_(old.get(self._parameters[index], tensor))

    def _make_buckets(self) -> None:
        places: dict[int, Tensor] = {}
        owners: dict[int, int] = {}
        for number, bucket in enumerate(self.buckets):
            members = [self._parameters[index] for index in bucket.members]
            lengths = [member.numel() for member in members]
            # The riders are appended to the bucket that backward finishes last.
            num_riders = [NUM_RIDERS, len(self._parameters)] if number == len(self.buckets) - 1 else [0, 0]
            message = self._riders.new_zeros(bucket.num_values + sum(num_riders))
            flat, riders, holders = message.split([bucket.num_values, *num_riders])
            places |= dict(zip(bucket.members, flat.split(lengths), strict=True))
            owners |= dict.fromkeys(bucket.members, number)
            self._messages.append(message)
            self._values.append(flat)
            self._add_compressor(number, bucket, [tuple(member.shape) for member in members])
        self._riders, self._holders = riders, holders
        self._views = [places[index].view_as(parameter) for index, parameter in enumerate(self._parameters)]
        for index, parameter in enumerate(self._parameters):
            hook = parameter.register_post_accumulate_grad_hook(partial(self._finished_one, index, owners[index]))
            self._hooks.append(hook)

    def _add_compressor(self, number: int, bucket: Bucket, shapes: list[tuple[int, ...]]) -> None:
        ranks: Sequence[int] = self._topology.group
        name, device = f"gradients.{number}", self._riders.device
        everyone = CompressionGroup(number, shapes, Communicator(name, runtime.process_set(ranks)), self._seed, device)
        self._dense.append(Dense(NO_COMPRESSION, everyone))
        if bucket.method == ReduceOp.adasum.name:
            self._compressors[number] = Adasum(NO_COMPRESSION, everyone)
        elif isinstance(self._compression, LossyConfig) and bucket.method != NO_COMPRESSION.name:
            if self._compression.two_level:
                ranks = self._topology.first_ranks_of_hosts
            communicator = Communicator(f"{name}.{bucket.method}", runtime.process_set(ranks))
            group = CompressionGroup(number, shapes, communicator, self._seed, device)
            self._compressors[number] = compression.build(self._compression, group, self._topology)

    def _plain_momentum(self) -> PlainMomentum | None:
        """The momentum of gradients that DGC leaves uncompressed."""
        cfg = self._compression
        if not isinstance(cfg, DGCConfig) or not cfg.momentum:
            return None
        plain = bucketing.members_without(cfg.name, self.buckets)
        return PlainMomentum(cfg.momentum, {index: self._parameters[index] for index in plain})

    def zero(self) -> None:
        """Starts a step: clears all gradients.

        Raises:
            TrainingError: a parameter requires a gradient that was frozen when the buckets were built.
        """
        for parameter in self._frozen:
            if parameter.requires_grad:
                raise TrainingError(
                    f"parameter {self._name_of[parameter]} was frozen and is trained now: its gradient would not be "
                    "summed over the ranks; call Gradients.rebuild() on all ranks after freezing or unfreezing"
                )
        self._riders.zero_()
        for parameter in self._name_of:
            parameter.grad = None

    def prepare_for_backward(self, loss: Tensor | float = 0.0, stop: bool = False, share: float = 0.0) -> None:
        """Lets the next backward send each bucket as soon as it has finished the bucket's gradients.

        Args:
            loss: this rank's part of the mean loss over the global batch.
            stop: whether this rank was asked to stop.
            share: this rank's fraction of the examples of the global batch; needed for the noise scale and adasum.
        """
        self._riders[0], self._riders[1] = loss, float(stop)
        if self._seeks_nonfinite:
            self._riders[3] += float(not math.isfinite(loss))
        self._share = share
        self._waiting = [set(bucket.members) for bucket in self.buckets]
        self._last_backward = True

    def synchronize(self) -> StepMetrics:
        """Waits until all buckets hold the sums over the replicas.

        Returns:
            The sums of the arguments of prepare_for_backward(), and the measurements.

        Raises:
            TrainingError: backward has changed a gradient after its bucket was sent.
        """
        self._last_backward = False
        errors = self._finish_exchanges()
        self._check_order()
        if self._seeks_nonfinite and not self._values:
            self._riders[3] += self._unscaled_alone()
        self._sum_tied()
        loss, stop, local_grad_sqnorm, overflow = self._sum_over_stages("step_sums", self._riders)
        loss_scale, is_skipped = self.loss_scale.value, False
        if self._seeks_nonfinite:
            is_skipped = bool(overflow > 0)
            self.loss_scale.update(is_skipped)
        if not is_skipped:
            self._keep_state()
        squares = norm(self._all_values()) ** 2 if self._measure_noise else 0.0
        bytes_sent = [self._compressor(number).num_bytes for number in range(len(self._values))]
        cosine, residual_norm = self._health(errors)
        if self._momentum and not is_skipped:
            self._momentum.apply()
        self.num_steps += 1
        measures = (squares, bytes_sent, cosine, residual_norm, loss_scale, self.loss_scale.skipped_steps)
        return StepMetrics(loss, stop, local_grad_sqnorm, overflow, *measures)

    def _check_order(self) -> None:
        if self._changed_late:
            names = ", ".join(self._name_of[self._parameters[index]] for index in sorted(self._changed_late))
            self._changed_late.clear()
            raise TrainingError(
                f"backward added to the gradients of {names} after they had left for the other ranks: a parameter "
                "was used by several backward passes, or by reentrant checkpointing of a shared layer; call "
                "prepare_for_backward() before the last pass alone, and use checkpointing with use_reentrant=False"
            )

    def clip_global_norm(self, max_norm: float) -> None:
        """Scales the gradients down to a global L2 norm of max_norm if theirs is larger; 0: no clipping.

        No-op with error feedback, because each rank has clipped its part before the exchange.

        Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
        https://arxiv.org/abs/1211.5063 (algorithm 1)
        """
        if not self._local_clip_norm:
            self._clip(max_norm, self._global_norm() if max_norm else 0.0)

    def _global_norm(self) -> Tensor:
        """The norm () of the gradients of all stages; a weight that several stages share counts once."""
        whole = norm(self._all_values())
        if self._topology.num_stages == 1:
            return whole
        again = [tied for tied, ranks in self._tied if ranks[0] not in self._topology.group]
        squares = whole**2 - sum(norm([tied.grad]) ** 2 for tied in again if tied.grad is not None)
        return self._sum_over_stages("squares", squares[None])[0].sqrt()

    def _clip(self, max_norm: float, whole: Tensor | float) -> None:
        if whole > max_norm:
            torch._foreach_mul_(self._all_values(), max_norm / whole)

    def sync_weights(self) -> None:
        """No-op for allreduce; ranks of a parameter server fetch the newest weights here."""

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The state of this rank's compressors, by name and index of the parameter; the tensors are views."""
        state: dict[str, dict[int, Tensor]] = {}
        for number, compressor in self._compressors.items():
            for name, tensors in compressor.state_by_gradient().items():
                state.setdefault(name, {}).update(zip(self.buckets[number].members, tensors, strict=True))
        return state | ({"momentum": self._momentum.velocities} if self._momentum else {})

    @property
    def local_state_fraction(self) -> float:
        """The fraction of a summed state that this rank gets: equal for all ranks that compress, 0 for others."""
        is_two_level = isinstance(self._compression, LossyConfig) and self._compression.two_level
        if not is_two_level:
            return 1 / len(self._topology.group)
        return 1 / len(self._topology.first_ranks_of_hosts) if self._topology.local_rank == 0 else 0.0

    def counters(self) -> Tensor:
        """(4,) float64: number of steps, loss scale, steps since it changed, skipped steps; the same on all ranks."""
        scale = self.loss_scale
        values = [self.num_steps, scale.value, scale.good_steps, scale.skipped_steps]
        return torch.tensor(values, dtype=torch.float64)

    def set_counters(self, values: Tensor) -> None:
        """Sets counters(), (4,), or (3,) from older checkpoints; the loss scale only if it is dynamic."""
        num_steps, scale, good_steps, *skipped_steps = values.tolist()
        self.num_steps, self.loss_scale.skipped_steps = int(num_steps), int(sum(skipped_steps))
        if self.loss_scale.is_dynamic:
            self.loss_scale.value, self.loss_scale.good_steps = scale, int(good_steps)

    def _all_values(self) -> list[Tensor]:
        """All gradients: one tensor per bucket, or one per parameter if there are no buckets."""
        return self._values or [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _compressor(self, number: int) -> Compressor:
        """The compressor that sums a bucket in this step."""
        starts = self._compression.start_step if isinstance(self._compression, LossyConfig) else 1
        is_on = number in self._compressors and self.num_steps + 1 >= starts
        return self._compressors[number] if is_on else self._dense[number]

    def _finished_one(self, index: int, number: int, parameter: nn.Parameter) -> None:
        """Hook after backward has added to a parameter's gradient: moves it into its bucket, and sends full buckets."""
        view = self._views[index]
        if parameter.grad is not None and parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)
        if self._last_backward:
            if number in self._sent:
                self._changed_late.add(index)
            self._waiting[number].discard(index)
            # The last bucket is sent last: it carries the overflow flag and the squared norms of all other buckets. To
            # clip before the exchange, all gradients are needed, so nothing is sent here.
            is_last_too_early = number == len(self.buckets) - 1 and len(self._sent) < number
            is_ready = not self._waiting[number] and not is_last_too_early and number not in self._sent
            if is_ready and not self._local_clip_norm:
                self._holders.fill_(1)  # used by the last bucket, when all others are sent
                self._send(number)

    def _send(self, number: int) -> None:
        values = self._values[number]
        if self.loss_scale.is_dynamic:
            values /= self.loss_scale.value
        if self._seeks_nonfinite:
            self._riders[3] += float(not values.isfinite().all())
        if self._measure_noise and self._share:
            # These gradients are sums over this rank's examples, divided by the global batch size.
            self._riders[2] += norm([values]) ** 2 / self._share**2
        compressor = self._compressor(number)
        if isinstance(compressor, Adasum) and self._share:
            values /= self._share
        self._sent[number] = values.clone() if self._looks_at_health else values
        compressor.group.communicator.begin()
        self._exchanges.start(number, compressor.exchange(self._messages[number], self.num_steps))

    def _finish_exchanges(self) -> list[Tensor]:
        """Sends buckets that backward has not sent, and waits for all; returns this rank's errors of the buckets."""
        if self._values and len(self.buckets) - 1 not in self._sent:
            has_gradient = [float(parameter.grad is not None) for parameter in self._parameters]
            self._holders.copy_(self._holders.new_tensor(has_gradient))
        for parameter, view in zip(self._parameters, self._views, strict=False):
            if parameter.grad is None:
                parameter.grad = view.zero_()
        if self._local_clip_norm:
            self._clip(self._local_clip_norm * self.loss_scale.value, norm(self._all_values()))
        for number in range(len(self._values)):
            if number not in self._sent:
                self._send(number)
        results = self._exchanges.finish()
        for number, (summed, _) in results.items():
            if summed is not self._messages[number]:
                self._messages[number].copy_(summed)
        for index, num_holders in enumerate(self._holders.tolist()):
            if not num_holders:
                self._parameters[index].grad = None
        return [error for _, error in results.values()]

    def _sum_tied(self) -> None:
        """Sums the gradients of weights that stages share; all ranks of a stage have the stage's sum before."""
        for tied, ranks in self._tied:
            if not tied.requires_grad:
                continue
            if tied.grad is None:
                tied.grad = torch.zeros_like(tied)
            if not self._topology.leads_group:
                tied.grad.zero_()
            hvd.allreduce_(tied.grad, name="tied", op=hvd.Sum, process_set=runtime.process_set(ranks))

    def _sum_over_stages(self, name: str, values: Tensor) -> Tensor:
        """Sums (n,) over the stages of values that are the same on all ranks of a stage."""
        if self._topology.num_stages == 1:
            return values.clone()
        return hvd.allreduce(values * self._topology.leads_group, name=name, op=hvd.Sum)

    def _keep_state(self) -> None:
        for number, compressor in self._compressors.items():
            if self._compressor(number) is compressor:
                compressor.commit()

    def _unscaled_alone(self) -> Tensor:
        """Divides the gradients by the loss scale, without an exchange; returns 1 if one is not finite, else 0."""
        values = self._all_values()
        if self.loss_scale.is_dynamic:
            torch._foreach_div_(values, self.loss_scale.value)
        return torch.tensor(float(not all(value.isfinite().all() for value in values)))

    @property
    def _looks_at_health(self) -> bool:
        return isinstance(self._compression, LossyConfig) and self._compression.health

    def _health(self, errors: list[Tensor]) -> tuple[float, float]:
        """The cosine to the true gradient and the norm of all residuals, measured by an uncompressed exchange."""
        if not self._looks_at_health:
            self._sent.clear()
            return 0.0, 0.0
        sent = torch.cat([self._sent[number] for number in range(len(self._values))])
        self._sent.clear()
        squares = norm(errors) ** 2
        process_set = runtime.process_set(self._topology.group)
        summed = hvd.allreduce(torch.cat([sent, squares[None]]), name="health", op=hvd.Sum, process_set=process_set)
        true, applied = summed[:-1], torch.cat(self._values)
        products = torch.stack([(true * applied).sum(), norm([true]) ** 2, norm([applied]) ** 2, summed[-1]])
        product, *norms, residual_norm = self._sum_over_stages("health_of_stages", products).tolist()
        return product / max(math.sqrt(norms[0] * norms[1]), 1e-30), math.sqrt(residual_norm)
