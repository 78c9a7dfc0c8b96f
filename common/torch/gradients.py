"""Gradients in flat buckets, summed over the replicas while backward still runs."""

import math
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Self

from common import buckets
from common.buckets import Bucket
from common.compression import local_clip_norm
from common.config import CompressionConfig, DGCConfig, LossyConfig, OnNonfinite, ReduceOp, RunConfig
from common.errors import TrainingError
from common.precision import LossScale
from common.step_sums import NUM_RIDERS, StepSums
from common.topology import Topology
from common.torch import compression, runtime
from common.torch.compression import Adasum, Channel, Compressor, Dense, Exchanges, PlainMomentum, Unit
from common.torch.norms import norm
from common.torch.stage import Stage

import horovod.torch as hvd
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

NO_COMPRESSION = CompressionConfig("none")


class Gradients:
    """The gradients of a model, in flat buckets that are exchanged as one vector each.

    Every rank adds up gradients of sums, already divided by the number of examples of the whole global batch. The
    exchange is then a sum, which stays exact when ranks have different numbers of examples. A parameter's .grad moves
    into its bucket when backward has made it, and stays there; one rank alone needs no buckets, unless it compresses.
    A parameter that no rank has a gradient of keeps none, so that the optimizer leaves it alone, as on one rank.

    Args:
        parameters: the model's, or those of this rank's stage of it, in their order, with or without names. Those that
            are frozen are left out; after freezing or unfreezing some, call rebuild().
        topology: whose ranks with the same weights take part.
        measure_noise: also takes the squared norms that the gradient noise scale needs.
        compression: what is done to gradients before they travel.
        op: how the ranks' gradients become one.
        loss_scale: that the losses are multiplied with.
        clip_norm: with error feedback, what clip_global_norm would keep afterwards: each rank clips its part before.
        seed: of the compressors' random numbers.
        bucket_bytes: largest size of a bucket of several gradients.
        tied: parameters that other stages have, too, each with all ranks that have it.
        skip_nonfinite: looks for losses and gradients that are not finite; StepSums.overflow then tells of them.
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
        bucket_bytes: int = buckets.BUCKET_BYTES,
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
        self.buckets = buckets.of_model(shapes, value_bytes, self._compression, self._op, self._bucket_bytes, tied)
        self._messages: list[Tensor] = []
        self._values: list[Tensor] = []  # the part of each message that holds gradients
        self._dense: list[Compressor] = []
        self._compressors: dict[int, Compressor] = {}  # of buckets that are not summed as they are
        self._views: list[Tensor] = []  # where each parameter's gradient has its place
        self._waiting: list[set[int]] = []  # the gradients of each bucket that this backward has yet to finish
        self._exchanges = Exchanges()
        self._sent: dict[int, Tensor] = {}  # buckets under way: what was sent, where the health is looked at
        self._last_backward = False
        self._changed_late: set[int] = set()  # gradients that backward added to after their bucket had left
        self._riders = self._parameters[0].new_zeros(NUM_RIDERS, requires_grad=False)
        self._holders = self._riders[:0]  # of each gradient, the number of ranks that have it
        if len(self._topology.group) > 1 or isinstance(self._compression, LossyConfig):
            self._make_buckets()
        self._momentum = self._plain_momentum()

    @classmethod
    def of(cls, cfg: RunConfig, model: Stage, topology: Topology) -> Self:
        """The gradients of a recipe's model."""
        noise, scale = cfg.train.measures_noise, LossScale.of(cfg.precision)
        settings = (noise, cfg.compression, cfg.op, scale, cfg.train.clip_norm, cfg.seed)
        skips = cfg.train.on_nonfinite is OnNonfinite.skip
        return cls(model.named_parameters(), topology, *settings, tied=model.tied, skip_nonfinite=skips)

    def rebuild(self) -> None:
        """Takes up the parameters that are trained from here on; to be called by all ranks after freezing some.

        What compressors have kept of a parameter stays.

        Raises:
            TrainingError: ranks train other parameters than each other.
        """
        trained = [name for parameter, name in self._name_of.items() if parameter.requires_grad]
        if any(others != trained for others in runtime.gather_json(trained)):
            raise TrainingError("the ranks have frozen other parameters than each other; freeze the same ones on all")
        for hook in self._hooks:
            hook.remove()
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
            # The riders travel in the bucket that backward finishes last.
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
        everyone = Unit(number, shapes, Channel(name, runtime.process_set(ranks)), self._seed, device)
        self._dense.append(Dense(NO_COMPRESSION, everyone))
        if bucket.method == ReduceOp.adasum.name:
            self._compressors[number] = Adasum(NO_COMPRESSION, everyone)
        elif isinstance(self._compression, LossyConfig) and bucket.method != NO_COMPRESSION.name:
            if self._compression.two_level:
                ranks = self._topology.first_ranks_of_hosts
            channel = Channel(f"{name}.{bucket.method}", runtime.process_set(ranks))
            unit = Unit(number, shapes, channel, self._seed, device)
            self._compressors[number] = compression.build(self._compression, unit, self._topology)

    def _plain_momentum(self) -> PlainMomentum | None:
        """The momentum of what DGC leaves uncompressed."""
        cfg = self._compression
        if not isinstance(cfg, DGCConfig) or not cfg.momentum:
            return None
        plain = [index for bucket in self.buckets if bucket.method != cfg.name for index in bucket.members]
        return PlainMomentum(cfg.momentum, {index: self._parameters[index] for index in plain})

    def zero(self) -> None:
        """Starts a step.

        Raises:
            TrainingError: a parameter is trained that was frozen when the buckets were made.
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

    def exchange_in_next_backward(self, loss: Tensor | float = 0.0, stop: bool = False, share: float = 0.0) -> None:
        """Sends each bucket off as soon as the next backward has finished its gradients.

        Args:
            loss: this rank's share of the global batch's mean loss.
            stop: whether this rank was asked to stop.
            share: this rank's share of the examples of the global batch; needed to measure the noise and by adasum.
        """
        self._riders[0], self._riders[1] = loss, float(stop)
        if self._seeks_nonfinite:
            self._riders[3] += float(not math.isfinite(loss))
        self._share = share
        self._waiting = [set(bucket.members) for bucket in self.buckets]
        self._last_backward = True

    def wait(self) -> StepSums:
        """Returns when all buckets hold the sums over the replicas.

        Returns:
            The sums of what was given to exchange_in_next_backward, and what was measured.

        Raises:
            TrainingError: backward has added to a gradient whose bucket had left.
        """
        self._last_backward = False
        errors = self._finish_exchanges()
        self._check_order()
        if self._seeks_nonfinite and not self._values:
            self._riders[3] += self._unscaled_alone()
        self._sum_tied()
        loss, stop, local_squares, overflow = self._sum_over_stages("step_sums", self._riders)
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
        return StepSums(loss, stop, local_squares, overflow, *measures)

    def _check_order(self) -> None:
        if self._changed_late:
            names = ", ".join(self._name_of[self._parameters[index]] for index in sorted(self._changed_late))
            self._changed_late.clear()
            raise TrainingError(
                f"backward added to the gradients of {names} after they had left for the other ranks: a parameter "
                "was used by several backward passes, or by reentrant checkpointing of a shared layer; call "
                "exchange_in_next_backward() before the last pass alone, and use checkpointing with use_reentrant=False"
            )

    def clip_global_norm(self, max_norm: float) -> None:
        """Scales the gradients down to a global L2 norm of max_norm where theirs is larger; 0: leaves them alone.

        With error feedback the ranks have clipped their parts before, and nothing is done.

        Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
        https://arxiv.org/abs/1211.5063 (algorithm 1)
        """
        if not self._local_clip_norm:
            self._clip(max_norm, self._global_norm() if max_norm else 0.0)

    def _global_norm(self) -> Tensor:
        """() the norm of all stages' gradients; a weight that stages share counts once."""
        whole = norm(self._all_values())
        if self._topology.num_stages == 1:
            return whole
        again = [tied for tied, ranks in self._tied if ranks[0] not in self._topology.group]
        squares = whole**2 - sum(norm([tied.grad]) ** 2 for tied in again if tied.grad is not None)
        return self._sum_over_stages("squares", squares[None])[0].sqrt()

    def _clip(self, max_norm: float, whole: Tensor | float) -> None:
        if whole > max_norm:
            torch._foreach_mul_(self._all_values(), max_norm / whole)

    def settle(self) -> None:
        """Returns when this rank has the newest weights; it always has."""

    def state(self) -> dict[str, dict[int, Tensor]]:
        """The compressors' state by name and parameter's index; views, this rank's alone."""
        state: dict[str, dict[int, Tensor]] = {}
        for number, compressor in self._compressors.items():
            for name, tensors in compressor.state().items():
                state.setdefault(name, {}).update(zip(self.buckets[number].members, tensors, strict=True))
        return state | ({"momentum": self._momentum.velocities} if self._momentum else {})

    @property
    def share_of_state(self) -> float:
        """The part of a summed state that this rank takes: the same for each rank that compresses."""
        is_two_level = isinstance(self._compression, LossyConfig) and self._compression.two_level
        if not is_two_level:
            return 1 / len(self._topology.group)
        return 1 / len(self._topology.first_ranks_of_hosts) if self._topology.local_rank == 0 else 0.0

    def counters(self) -> Tensor:
        """(4,) float64 steps made, loss scale, steps since it changed, steps skipped; the same on all ranks."""
        scale = self.loss_scale
        values = [self.num_steps, scale.value, scale.good_steps, scale.skipped_steps]
        return torch.tensor(values, dtype=torch.float64)

    def set_counters(self, values: Tensor) -> None:
        """Takes over counters(), or (3,) of them from an older checkpoint; the loss scale where there is one."""
        num_steps, scale, good_steps, *skipped_steps = values.tolist()
        self.num_steps, self.loss_scale.skipped_steps = int(num_steps), int(sum(skipped_steps))
        if self.loss_scale.is_dynamic:
            self.loss_scale.value, self.loss_scale.good_steps = scale, int(good_steps)

    def _all_values(self) -> list[Tensor]:
        """All gradients, in as few tensors as there are."""
        return self._values or [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _compressor(self, number: int) -> Compressor:
        """What sums a bucket in this step."""
        starts = self._compression.start_step if isinstance(self._compression, LossyConfig) else 1
        is_on = number in self._compressors and self.num_steps + 1 >= starts
        return self._compressors[number] if is_on else self._dense[number]

    def _finished_one(self, index: int, number: int, parameter: nn.Parameter) -> None:
        """Backward has added to a parameter's gradient, which is to lie in its bucket."""
        view = self._views[index]
        if parameter.grad is not None and parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)
        if self._last_backward:
            if number in self._sent:
                self._changed_late.add(index)
            self._waiting[number].discard(index)
            # The last bucket carries what is known when all others have been looked at, and a norm is known when all
            # are there.
            is_last_too_early = number == len(self.buckets) - 1 and len(self._sent) < number
            is_ready = not self._waiting[number] and not is_last_too_early and number not in self._sent
            if is_ready and not self._local_clip_norm:
                self._holders.fill_(1)  # of the last bucket, when all others have left
                self._send(number)

    def _send(self, number: int) -> None:
        values = self._values[number]
        if self.loss_scale.is_dynamic:
            values /= self.loss_scale.value
        if self._seeks_nonfinite:
            self._riders[3] += float(not values.isfinite().all())
        if self._measure_noise and self._share:
            # Gradients here are sums over this rank's examples divided by the global batch's size.
            self._riders[2] += norm([values]) ** 2 / self._share**2
        compressor = self._compressor(number)
        if isinstance(compressor, Adasum) and self._share:
            values /= self._share
        self._sent[number] = values.clone() if self._looks_at_health else values
        compressor.unit.channel.begin()
        self._exchanges.start(number, compressor.exchange(self._messages[number], self.num_steps))

    def _finish_exchanges(self) -> list[Tensor]:
        """Sends the buckets of parameters that this backward did not reach, and waits for all; their errors."""
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
        """Adds up the gradients of weights that stages share; all ranks of a stage have the stage's sum."""
        for tied, ranks in self._tied:
            if not tied.requires_grad:
                continue
            if tied.grad is None:
                tied.grad = torch.zeros_like(tied)
            if not self._topology.leads_group:
                tied.grad.zero_()
            hvd.allreduce_(tied.grad, name="tied", op=hvd.Sum, process_set=runtime.process_set(ranks))

    def _sum_over_stages(self, name: str, values: Tensor) -> Tensor:
        """(n,) sums of what all ranks of a stage have alike."""
        if self._topology.num_stages == 1:
            return values.clone()
        return hvd.allreduce(values * self._topology.leads_group, name=name, op=hvd.Sum)

    def _keep_state(self) -> None:
        for number, compressor in self._compressors.items():
            if self._compressor(number) is compressor:
                compressor.commit()

    def _unscaled_alone(self) -> Tensor:
        """Unscales the gradients of one rank alone; 1 if there was an overflow."""
        values = self._all_values()
        if self.loss_scale.is_dynamic:
            torch._foreach_div_(values, self.loss_scale.value)
        return torch.tensor(float(not all(value.isfinite().all() for value in values)))

    @property
    def _looks_at_health(self) -> bool:
        return isinstance(self._compression, LossyConfig) and self._compression.health

    def _health(self, errors: list[Tensor]) -> tuple[float, float]:
        """The cosine to the true gradient and the norm of all residuals; by an uncompressed exchange."""
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
