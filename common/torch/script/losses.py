"""Notes how many targets a mean loss of this rank's rows is a mean of, where some do not count.

The mean of F.cross_entropy or F.nll_loss is over the targets that are not ignored, or over their classes' weights.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from common.errors import TrainingError
from common.torch.script import part, replacing

import torch
from torch import Tensor
from torch.nn import functional as F

_noted: list[tuple[float, bool]] = []  # targets for each row, and whether some of them do not count


@functools.cache
def install() -> None:
    """Wraps the two functions; outside of an epoch of a distributed loader they act as before."""
    for name in ("cross_entropy", "nll_loss"):
        replacing.replace(F, name, _wrapped(getattr(F, name)))


def forget() -> None:
    """Forgets the losses so far: a batch or a backward has ended."""
    _noted.clear()


def targets_per_row() -> float | None:
    """Number of counted targets for each row in the losses since forget(); None if that does not matter.

    Raises:
        TrainingError: several losses have counted different numbers.
    """
    noted = set(_noted)
    if not noted or (len(noted) > 1 and not has_partial()):
        return None
    if len({number for number, _ in noted}) > 1:
        raise TrainingError(
            "several losses of a step ignore different numbers of targets: they cannot be weighted alike; call "
            "backward for each of them"
        )
    return next(iter(noted))[0]


def has_partial() -> bool:
    """Whether some targets of a loss since forget() do not count, or count with another weight."""
    return any(is_partial for _, is_partial in _noted)


def _wrapped(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
    signature = inspect.signature(plain)

    @functools.wraps(plain)
    def loss(*args: Any, **kwargs: Any) -> Tensor:
        of_step = part.current()
        if of_step and torch.is_grad_enabled():
            given = signature.bind(*args, **kwargs)
            given.apply_defaults()
            _note(of_step, **given.arguments)
        return plain(*args, **kwargs)

    return loss


def _note(
    of_step: part.Part,
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: int,
    reduction: str,
    **_: Any,
) -> None:
    if reduction == "mean" and input.requires_grad and not target.is_floating_point():
        counted = target != ignore_index
        total = counted.sum().item() if weight is None else weight[target[counted]].sum().item()
        _noted.append((total / of_step.num_computed, weight is not None or total < target.numel()))
