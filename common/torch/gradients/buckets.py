"""Flat buckets that hold the gradients of a model."""

from collections.abc import Mapping, Sequence

from common.gradients.bucketing import Bucket
from common.gradients.step_metrics import NUM_SCALARS
from common.torch.distributed import runtime

from torch import Tensor, nn


class BucketBuffers:
    """One flat tensor per bucket; .grad of each parameter is a view of its bucket.

    A flag for each parameter rides in the last bucket. Summed over the ranks, it is the number of ranks that have a
    gradient of it. Where no rank has one, .grad is None after the exchange, as on a single rank.

    Args:
        parameters: the trained parameters, in the model's order.
        buckets: which parameters each bucket holds; the last one has room for scalars. Empty if nothing is exchanged.

    Attributes:
        messages: for each bucket, the tensor that is exchanged.
        values: for each bucket, the part of its message that holds gradients.
        scalars: (NUM_SCALARS,) the scalars in the last message: loss, stop, local_grad_sqnorm, overflow.
        bucket_of: for each parameter, the number of its bucket.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], buckets: Sequence[Bucket]) -> None:
        self._parameters = parameters
        self.messages: list[Tensor] = []
        self.values: list[Tensor] = []
        self.bucket_of: dict[int, int] = {}
        self.scalars = parameters[0].new_zeros(NUM_SCALARS, requires_grad=False)
        self._num_holders = self.scalars[:0]
        views: dict[int, Tensor] = {}
        for number, bucket in enumerate(buckets):
            members = [parameters[index] for index in bucket.members]
            lengths = [member.numel() for member in members]
            extra = [NUM_SCALARS, len(parameters)] if number == len(buckets) - 1 else [0, 0]
            message = runtime.shared_zeros(sum(lengths) + sum(extra), parameters[0].detach())
            flat, self.scalars, self._num_holders = message.split([sum(lengths), *extra])
            views |= dict(zip(bucket.members, flat.split(lengths), strict=True))
            self.bucket_of |= dict.fromkeys(bucket.members, number)
            self.messages.append(message)
            self.values.append(flat)
        self._views = [views[index].view_as(parameters[index]) for index in sorted(views)]

    def adopt(self, index: int) -> None:
        """Moves a parameter's gradient into its bucket."""
        parameter, view = self._parameters[index], self._views[index]
        if parameter.grad is not None and parameter.grad is not view:
            parameter.grad = view.copy_(parameter.grad)

    def adopt_all(self) -> None:
        """Moves all gradients into their buckets; parameters without one get a gradient of zeros."""
        for index in range(len(self._parameters)):
            self.adopt(index)
        self.fill_absent()

    def mark_all_present(self) -> None:
        """Notes that this rank has a gradient of each parameter."""
        self._num_holders.fill_(1)

    def mark_present(self) -> None:
        """Notes of which parameters this rank has a gradient."""
        flags = [float(parameter.grad is not None) for parameter in self._parameters]
        self._num_holders.copy_(self._num_holders.new_tensor(flags))

    def fill_absent(self) -> None:
        """Gives parameters without a gradient a gradient of zeros."""
        for parameter, view in zip(self._parameters, self._views, strict=False):
            if parameter.grad is None:
                parameter.grad = view.zero_()

    def receive(self, summed: Mapping[int, Tensor]) -> None:
        """Takes the exchanged message of each bucket, by its number; removes gradients that no rank has."""
        for number, message in summed.items():
            if message is not self.messages[number]:
                self.messages[number].copy_(message)
        for index, num_holders in enumerate(self._num_holders.tolist()):
            if not num_holders:
                self._parameters[index].grad = None
