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
            row = _Row()
            stack.callback(model.register_forward_pre_hook(row.put_in, with_kwargs=True).remove)
            stack.callback(model.register_forward_hook(row.take_out).remove)
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


class _Row:
    """Two hooks of a model: many cannot reshape a tensor without elements, so it gets a row of ones instead."""

    def __init__(self) -> None:
        self._is_in: list[bool] = []  # for each call of the model that has begun

    def put_in(self, model: nn.Module, args: Any, kwargs: Any) -> Any:
        """Hook before forward: gives empty tensors a row."""
        self._is_in.append(any(map(_is_empty, tree_leaves((args, kwargs)))))

        def filled(tensor: Tensor) -> Tensor:
            return tensor.new_ones((1, *tensor.shape[1:])) if _is_empty(tensor) else tensor

        return tree_map_only(Tensor, filled, (args, kwargs))

    def take_out(self, model: nn.Module, args: Any, outputs: Any) -> Any:
        """Hook after forward: takes the row away again."""
        if not self._is_in.pop():
            return outputs
        return tree_map_only(Tensor, lambda each: each[:0] if each.dim() and len(each) == 1 else each, outputs)
