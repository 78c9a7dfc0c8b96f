"""Notes how many targets a mean loss of this rank's rows is a mean of, where some do not count.

The mean of F.cross_entropy or F.nll_loss is over the targets that are not ignored, or over their classes' weights.
"""

import functools
from collections.abc import Callable
from typing import Any

from common.errors import TrainingError
from common.torch.script import part

from torch import Tensor
from torch.nn import functional as F

_noted: list[tuple[float, bool]] = []  # targets for each row, and whether some of them do not count


@functools.cache
def install() -> None:
    """Wraps the two functions; outside of an epoch of a distributed loader they act as before."""
    F.cross_entropy = _wrapped(F.cross_entropy)
    F.nll_loss = _wrapped(F.nll_loss)


def targets_per_row() -> float | None:
    """Number of counted targets for each row in the losses since the last call; None if that does not matter here.

    Raises:
        TrainingError: several losses have counted different numbers.
    """
    noted = set(_noted)
    _noted.clear()
    if not noted or (len(noted) > 1 and not any(is_partial for _, is_partial in noted)):
        return None
    if len({number for number, _ in noted}) > 1:
        raise TrainingError(
            "several losses of a step ignore different numbers of targets: they cannot be weighted alike; call "
            "backward for each of them"
        )
    return next(iter(noted))[0]


def _wrapped(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def loss(input: Tensor, target: Tensor, weight: Tensor | None = None, *args: Any, **options: Any) -> Tensor:
        of_step = part.current()
        is_mean = options.get("reduction", "mean") == "mean" and not args
        if of_step and is_mean and input.requires_grad and not target.is_floating_point():
            counted = target != options.get("ignore_index", -100)
            total = counted.sum().item() if weight is None else weight[target[counted]].sum().item()
            _noted.append((total / of_step.num_computed, weight is not None or total < target.numel()))
        return plain(input, target, weight, *args, **options)

    return loss
