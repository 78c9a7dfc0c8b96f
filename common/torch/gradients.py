"""Gradients in flat buckets, summed over the replicas while backward still runs."""

from collections.abc import Callable, Iterable

from common import buckets, stopping
from common.step_sums import StepSums
from common.topology import Topology

import horovod.torch as hvd
import torch
from torch import Tensor, nn


class Gradients:
    """The gradients of a model, as views into flat buckets that are exchanged as one message each.

    Every rank adds up gradients of sums, already divided by the number of examples of the whole global batch. The
    exchange is then a sum, which stays exact when ranks have different numbers of examples.

    Args:
        parameters: the model's, in its order; their .grad is set here and must stay.
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
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [parameter.numel() * parameter.element_size() for parameter in trained]
        self._messages: list[Tensor] = []
        self._buckets: list[Tensor] = []  # the part of each message that holds gradients
        self._waiting: list[int] = []  # per bucket: gradients that this backward has yet to finish
        self._members: list[int] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: dict[int, int] = {}
        self._last_backward = False
        assigned = buckets.assign(sizes, bucket_bytes)
        for number, indices in enumerate(assigned):
            members = [trained[index] for index in indices]
            lengths = [member.numel() for member in members]
            # The scalars travel in the bucket that backward finishes last.
            num_scalars = len(StepSums._fields) if number == len(assigned) - 1 else 0
            message = torch.zeros(sum(lengths) + num_scalars, dtype=members[0].dtype, device=members[0].device)
            flat, self._scalars = message.split([sum(lengths), num_scalars])
            for member, part in zip(members, flat.split(lengths), strict=True):
                view = part.view_as(member)
                member.grad = view
                self._views.append((member, view))
                member.register_post_accumulate_grad_hook(lambda _, number=number: self._finished_one(number))
            self._messages.append(message)
            self._buckets.append(flat)
            self._members.append(len(members))

    @property
    def num_values(self) -> int:
        """Number of values in all gradients."""
        return sum(flat.numel() for flat in self._buckets)

    def zero(self) -> None:
        """Starts a step."""
        for message in self._messages:
            message.zero_()

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

        Raises:
            RuntimeError: a parameter's .grad was replaced, as optimizer.zero_grad() does.
        """
        self._last_backward = False
        if any(parameter.grad is not view for parameter, view in self._views):
            raise RuntimeError("a .grad has left its bucket; call gradients.zero() in place of optimizer.zero_grad()")
        if self._num_replicas > 1:
            for number in range(len(self._buckets)):
                if number not in self._handles:  # it holds a parameter that this backward did not reach
                    self._send(number)
            for handle in self._handles.values():
                hvd.synchronize(handle)
            self._handles.clear()
        if self._measure_noise:
            self._scalars[3] = sum(flat.square().sum() for flat in self._buckets)
        return StepSums(*self._scalars.clone())

    def clip_global_norm(self, max_norm: float) -> None:
        """Scales the gradients down to a global L2 norm of max_norm where theirs is larger; 0: leaves them alone.

        Source: Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013,
        https://arxiv.org/abs/1211.5063 (algorithm 1)
        """
        if max_norm:
            norm = torch.stack([torch.linalg.vector_norm(flat) for flat in self._buckets]).norm()
            for flat in self._buckets:
                flat.mul_(max_norm / norm.clamp(min=max_norm))

    def _finished_one(self, number: int) -> None:
        if self._last_backward:
            self._waiting[number] -= 1
            if not self._waiting[number] and self._num_replicas > 1:
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
