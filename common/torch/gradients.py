"""Gradients in flat buckets, summed over the replicas while backward still runs."""

from collections.abc import Callable, Iterable
from functools import partial

from common import buckets, stopping
from common.step_sums import StepSums
from common.topology import Topology

import horovod.torch as hvd
from torch import Tensor, nn


class Gradients:
    """The gradients of a model, in flat buckets that are exchanged as one message each.

    Every rank adds up gradients of sums, already divided by the number of examples of the whole global batch. The
    exchange is then a sum, which stays exact when ranks have different numbers of examples. A parameter's .grad moves
    into its bucket when backward has made it, and stays there; one rank alone needs no buckets.

    Args:
        parameters: the model's, in its order.
        topology: whose replicas take part.
        measure_noise: also takes the squared norms that the gradient noise scale needs.
        bucket_bytes: largest size of a bucket of several gradients.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        topology: Topology,
        measure_noise: bool = False,
        bucket_bytes: int = buckets.BUCKET_BYTES,
    ) -> None:
        self._num_replicas = topology.num_replicas
        self._measure_noise = measure_noise
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._messages: list[Tensor] = []
        self._buckets: list[Tensor] = []  # the part of each message that holds gradients
        self._views: list[Tensor] = []  # where each parameter's gradient has its place
        self._members: list[int] = []  # number of gradients in each bucket
        self._waiting: list[int] = []  # of them, those that this backward has yet to finish
        self._handles: dict[int, int] = {}
        self._last_backward = False
        self._scalars = self._parameters[0].new_zeros(len(StepSums._fields), requires_grad=False)
        if self._num_replicas > 1:
            self._make_buckets(bucket_bytes)

    def _make_buckets(self, bucket_bytes: int) -> None:
        places: dict[int, Tensor] = {}
        sizes = [parameter.numel() * parameter.element_size() for parameter in self._parameters]
        assigned = buckets.assign(sizes, bucket_bytes)
        for number, indices in enumerate(assigned):
            members = [self._parameters[index] for index in indices]
            lengths = [member.numel() for member in members]
            # The scalars travel in the bucket that backward finishes last.
            num_scalars = len(self._scalars) if number == len(assigned) - 1 else 0
            message = members[0].new_zeros(sum(lengths) + num_scalars, requires_grad=False)
            flat, scalars = message.split([sum(lengths), num_scalars])
            places |= dict(zip(indices, flat.split(lengths), strict=True))
            self._messages.append(message)
            self._buckets.append(flat)
            self._members.append(len(members))
            for index, member in zip(indices, members, strict=True):
                member.register_post_accumulate_grad_hook(partial(self._finished_one, index, number))
        self._scalars = scalars
        self._views = [places[index].view_as(parameter) for index, parameter in enumerate(self._parameters)]

    @property
    def num_values(self) -> int:
        """Number of values in all gradients."""
        return sum(parameter.numel() for parameter in self._parameters)

    def zero(self) -> None:
        """Starts a step."""
        self._scalars.zero_()
        for parameter in self._parameters:
            parameter.grad = None

    def exchange_in_next_backward(self, loss: Tensor | float = 0.0, stop: bool = False, share: float = 0.0) -> None:
        """Sends each bucket off as soon as the next backward has finished its gradients.

        Args:
            loss: this rank's share of the global batch's mean loss.
            stop: whether this rank was asked to stop.
            share: this rank's share of the examples of the global batch; needed to measure the noise alone.
        """
        self._scalars[0], self._scalars[1] = loss, float(stop)
        self._share = share
        self._waiting = list(self._members)
        self._last_backward = True

    def wait(self) -> StepSums:
        """Returns when all buckets hold the sums over the replicas.

        Returns:
            The sums of what was given to exchange_in_next_backward, and the squared norms if they are measured.
        """
        self._last_backward = False
        if self._num_replicas > 1:
            self._send_the_rest()
            for handle in self._handles.values():
                hvd.synchronize(handle)
            self._handles.clear()
        if self._measure_noise:
            self._scalars[3] = sum(values.square().sum() for values in self._values())
        return StepSums(*self._scalars.clone())

    def clip_global_norm(self, max_norm: float) -> None:
        """Scales the gradients down to a global L2 norm of max_norm where theirs is larger; 0: leaves them alone.

        Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
        https://arxiv.org/abs/1211.5063 (algorithm 1)
        """
        if max_norm:
            norm = nn.utils.get_total_norm(self._values())
            if norm > max_norm:
                for values in self._values():
                    values.mul_(max_norm / norm)

    def _values(self) -> list[Tensor]:
        """All gradients, in as few tensors as there are."""
        return self._buckets or [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _finished_one(self, index: int, number: int, parameter: nn.Parameter) -> None:
        """Backward has added to a parameter's gradient, which is to lie in its bucket."""
        view = self._views[index]
        if parameter.grad is not None and parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)
        if self._last_backward:
            self._waiting[number] -= 1
            if not self._waiting[number]:
                self._send(number)

    def _send_the_rest(self) -> None:
        """Sends the buckets that hold a parameter which this backward did not reach."""
        for parameter, view in zip(self._parameters, self._views, strict=True):
            if parameter.grad is None:
                parameter.grad = view.zero_()
        for number in range(len(self._buckets)):
            if number not in self._handles:
                self._send(number)

    def _send(self, number: int) -> None:
        if self._measure_noise and self._share:
            # Gradients here are sums over this rank's examples divided by the global batch's size.
            squares = self._buckets[number].square().sum() / self._share**2
            self._scalars[2] += squares / self._num_replicas
        self._handles[number] = hvd.allreduce_async_(self._messages[number], name=f"gradients.{number}", op=hvd.Sum)


def forward_backward(
    model: nn.Module,
    sum_of_losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    num_micro_batches: int,
    global_size: int,
    gradients: Gradients,
) -> StepSums:
    """Forward and backward, one micro-batch after another; leaves the mean over the global batch in the gradients.

    Args:
        model: what is differentiated.
        sum_of_losses: (outputs, targets) -> sum over the examples, not their mean.
        inputs: (B, ...) this rank's examples of the step; B may be 0.
        targets: (B, ...)
        num_micro_batches: parts to cut the B examples into; they differ by one example at most.
        global_size: number of examples of all ranks in this step.
        gradients: the model's.
    """
    gradients.zero()
    total: Tensor | float = 0.0
    parts = zip(inputs.tensor_split(num_micro_batches), targets.tensor_split(num_micro_batches), strict=True)
    for number, (part_inputs, part_targets) in enumerate(parts, start=1):
        loss = sum_of_losses(model(part_inputs), part_targets) / global_size
        total = total + loss.detach()
        if number == num_micro_batches:
            gradients.exchange_in_next_backward(total, stopping.requested(), len(inputs) / global_size)
        loss.backward()
    return gradients.wait()
