"""Lets a rank take part in an evaluation's batch of which it has no row."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map_only


@contextmanager
def allowed(models: Iterable[nn.Module]) -> Iterator[None]:
    """Within, models take a batch of size 0, and the mean over nothing is 0, as it counts for nothing."""
    with ExitStack() as stack:
        stack.enter_context(_MeansOfNothing())
        for model in models:
            stack.callback(model.register_forward_pre_hook(_with_a_row, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(_without_it).remove)
        yield


class _MeansOfNothing(TorchFunctionMode):
    """A loss of a batch of size 0 is 0 instead of NaN, which a product with its number of rows would keep."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls a function of PyTorch."""
        result = function(*args, **(kwargs or {}))
        is_number = isinstance(result, Tensor) and not result.dim() and result.is_floating_point()
        if is_number and any(map(_is_empty, tree_leaves((args, kwargs)))) and bool(result.isnan()):
            return torch.zeros_like(result)
        return result


def _is_empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and not len(value)


def _with_a_row(model: nn.Module, args: Any, kwargs: Any) -> Any:
    """Hook before forward: many models cannot reshape a tensor without elements, so they get a row of ones."""

    def filled(tensor: Tensor) -> Tensor:
        return tensor.new_ones((1, *tensor.shape[1:])) if _is_empty(tensor) else tensor

    return tree_map_only(Tensor, filled, (args, kwargs))


def _without_it(model: nn.Module, args: Any, outputs: Any) -> Any:
    """Hook after forward: takes the row away again."""
    return tree_map_only(Tensor, lambda tensor: tensor[:0] if tensor.dim() and len(tensor) == 1 else tensor, outputs)
