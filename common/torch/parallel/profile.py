"""Profiles layers on fake tensors: parameters, activation bytes, FLOPs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from common.config.schema import PrecisionConfig
from common.parallel.cost_model import LayerProfile
from common.torch.distributed import runtime

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode


def profile_layers(
    build: Callable[[], Sequence[nn.Module]], inputs: np.ndarray, precision: PrecisionConfig
) -> list[LayerProfile]:
    """Profiles the layers of a model.

    Args:
        build: builds the layers, in order.
        inputs: (B, ...) a micro-batch, of which only shape and dtype matter.
        precision: the dtypes.
    """
    cpu, compute_dtype = torch.device("cpu"), getattr(torch, precision.compute_dtype.name)
    is_mixed = precision.compute_dtype is not precision.dtype
    tensor = runtime.to_tensor(inputs, precision, cpu)
    autocast = torch.autocast("cpu", compute_dtype, enabled=is_mixed)
    facts: list[LayerProfile] = []
    with FakeTensorMode() as mode, _default_dtype(runtime.dtype(precision)), autocast:
        model = nn.Sequential(*build())
        known: dict[int, Tensor] = {_storage(weight): weight for weight in model.parameters()}
        values: Tensor = mode.from_tensor(tensor)
        for layer in model:
            layer_facts, values = _facts(layer, values, known)
            facts.append(layer_facts)
    return facts


def _facts(layer: nn.Module, inputs: Tensor, known: dict[int, Tensor]) -> tuple[LayerProfile, Tensor]:
    """The profile of a layer, and its outputs; adds the tensors that it keeps to `known`."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in known:
            kept[_storage(tensor)] = tensor
        return tensor

    with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept):
        outputs: Tensor = layer(inputs)
    known |= kept
    facts = LayerProfile(
        type(layer).__name__,
        {id(weight): weight.numel() for weight in layer.parameters()},
        outputs[0].numel(),
        sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        float(counter.get_total_flops()),
    )
    return facts, outputs


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within this context, weights have this dtype; the dtype of fake weights cannot be changed later."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _storage(tensor: Tensor) -> int:
    """A number that is the same for tensors that share memory."""
    return tensor.untyped_storage()._cdata
