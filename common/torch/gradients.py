"""Gradients in flat buckets, summed over the replicas while backward still runs."""

from collections.abc import Callable, Iterable

from common import buckets
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
        bucket_bytes: largest size of a bucket of several gradients.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], topology: Topology, bucket_bytes: int = buckets.BUCKET_BYTES
    ) -> None:
        self._alone = topology.num_replicas == 1
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        sizes = [parameter.numel() * parameter.element_size() for parameter in trained]
        self._buckets: list[Tensor] = []
        self._waiting: list[int] = []  # per bucket: gradients that this backward has yet to finish
        self._members: list[int] = []
        self._views: list[tuple[nn.Parameter, Tensor]] = []
        self._handles: dict[int, int] = {}
        self._last_backward = False
        for number, indices in enumerate(buckets.assign(sizes, bucket_bytes)):
            members = [trained[index] for index in indices]
            flat = torch.zeros(
                sum(member.numel() for member in members), dtype=members[0].dtype, device=members[0].device
            )
            for member, part in zip(members, flat.split([member.numel() for member in members]), strict=True):
                view = part.view_as(member)
                member.grad = view
                self._views.append((member, view))
                member.register_post_accumulate_grad_hook(lambda _, number=number: self._finished_one(number))
            self._buckets.append(flat)
            self._members.append(len(members))

    @property
    def num_values(self) -> int:
        """Number of values in all gradients."""
        return sum(flat.numel() for flat in self._buckets)

    def zero(self) -> None:
        """Starts a step."""
        for flat in self._buckets:
            flat.zero_()

    def exchange_in_next_backward(self) -> None:
        """Sends each bucket off as soon as the next backward has finished its gradients."""
        self._waiting = list(self._members)
        self._last_backward = True

    def wait(self) -> None:
        """Returns when all buckets hold the sums over the replicas.

        Raises:
            RuntimeError: a parameter's .grad was replaced, as optimizer.zero_grad() does.
        """
        self._last_backward = False
        if any(parameter.grad is not view for parameter, view in self._views):
            raise RuntimeError("a .grad has left its bucket; call gradients.zero() in place of optimizer.zero_grad()")
        if self._alone:
            return
        for number in range(len(self._buckets)):
            if number not in self._handles:  # it holds a parameter that this backward did not reach
                self._send(number)
        for handle in self._handles.values():
            hvd.synchronize(handle)
        self._handles.clear()

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
            if not self._waiting[number] and not self._alone:
                self._send(number)

    def _send(self, number: int) -> None:
        self._handles[number] = hvd.allreduce_async_(self._buckets[number], name=f"gradients.{number}", op=hvd.Sum)


def forward_backward(
    model: nn.Module,
    sum_of_losses: Callable[[Tensor, Tensor], Tensor],
    inputs: Tensor,
    targets: Tensor,
    num_micro_batches: int,
    global_size: int,
    gradients: Gradients,
) -> Tensor:
    """Forward and backward, one micro-batch after another; leaves the mean over the global batch in the gradients.

    Args:
        model: what is differentiated.
        sum_of_losses: (outputs, targets) -> sum over the examples, not their mean.
        inputs: (B, ...) this rank's examples of the step; B may be 0.
        targets: (B, ...)
        num_micro_batches: parts to cut the B examples into; they differ by one example at most.
        global_size: number of examples of all ranks in this step.
        gradients: the model's.

    Returns:
        This rank's share of the mean loss: the shares of all ranks add up to it.
    """
    gradients.zero()
    total = inputs.new_zeros((), dtype=torch.float64)
    parts = zip(inputs.tensor_split(num_micro_batches), targets.tensor_split(num_micro_batches), strict=True)
    for number, (part_inputs, part_targets) in enumerate(parts, start=1):
        loss = sum_of_losses(model(part_inputs), part_targets) / global_size
        if number == num_micro_batches:
            gradients.exchange_in_next_backward()
        loss.backward()
        total += loss.detach()
    gradients.wait()
    return total
