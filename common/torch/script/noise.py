"""Random numbers of a distributed step: this rank's rows of those that one rank would draw for the global batch.

So dropout masks and noise differ between the ranks, and are the same for every number of ranks. All ranks keep their
generators in the same state for that. Where the batch is not the first dimension, within PyTorch's recurrent layers,
and in attention on a GPU, each rank draws other numbers instead. It may do so everywhere, as to draw for all rows costs
much with many ranks.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from common.distributed import noise_kind
from common.distributed.topology import Topology
from common.torch.script import part, replacing

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")

IN_PLACE = ("normal_", "uniform_", "bernoulli_", "exponential_", "random_")


@functools.cache
def install(topology: Topology) -> None:
    """Wraps functions of PyTorch; outside of an epoch of a distributed loader they act as before."""
    for name in DROPOUTS:
        replacing.replace(F, name, _dropout(getattr(F, name), topology))
    for name in ("rand", "randn", "randint"):
        replacing.replace(torch, name, _by_shape(getattr(torch, name), topology))
    for name in ("rand_like", "randn_like"):
        replacing.replace(torch, name, _like(getattr(torch, name), topology))
    for name in ("normal", "bernoulli", "poisson", "multinomial"):
        replacing.replace(torch, name, _of_this_rank(getattr(torch, name), topology))
    for name in IN_PLACE:
        setattr(Tensor, name, _in_place(getattr(Tensor, name), topology))
    replacing.replace(F, "scaled_dot_product_attention", _attention(F.scaled_dot_product_attention, topology))
    setattr(nn.RNNBase, "__call__", _recurrent(nn.RNNBase.__call__, topology))  # noqa: B010 (mypy)


@contextmanager
def of_this_rank(topology: Topology) -> Iterator[None]:
    """Other random numbers on each rank within; after it, all ranks go on with the same ones."""
    seed = int(torch.randint(2**31, ()))
    with torch.random.fork_rng():
        torch.manual_seed(int(np.random.SeedSequence((seed, topology.rank)).generate_state(1)[0]))
        yield


def _rows(num_rows: int) -> tuple[int, Tensor] | None:
    """How many rows to draw, and the numbers of this rank's among them; None if they do not belong to the batch.

    Up to three rows for each row of the batch are those of tensors that were put one after another (a GAN's real and
    generated images); more are a dimension that was merged with the batch.
    """
    of_step = part.drawing()
    if of_step is None or noise_kind.is_of_rank() or not num_rows or num_rows % of_step.num_computed:
        return None
    num_blocks = num_rows // of_step.num_computed
    of_block = torch.arange(of_step.num_computed) + of_step.first
    if num_blocks <= 3:
        rows = (torch.arange(num_blocks)[:, None] * of_step.num_global + of_block).flatten()
    else:
        rows = (of_block[:, None] * num_blocks + torch.arange(num_blocks)).flatten()
    return num_blocks * of_step.num_global, rows


def _ones(num_rows: int, like: Tensor) -> Tensor:
    """Ones for so many rows, whose values lie in memory in the order of those of `like`: they are drawn in it."""
    order = sorted(range(like.dim()), key=like.stride, reverse=True)
    shape = (num_rows, *like.shape[1:])
    ones = like.new_ones([shape[axis] for axis in order])
    return ones.permute([order.index(axis) for axis in range(like.dim())])


def _dropout(plain: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if part.drawing() is None or not training or p == 0.0:
            return plain(input, p, training, inplace)
        found = _rows(len(input)) if input.dim() else None
        if found is None or "alpha" in plain.__name__:
            with of_this_rank(topology):
                return plain(input, p, training, inplace)
        num_drawn, rows = found
        mask = plain(_ones(num_drawn, input), p, True)[rows.to(input.device)]
        return input.mul_(mask) if inplace else input * mask

    return dropout


def _by_shape(plain: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def draw(*args: Any, **options: Any) -> Tensor:
        of_step, (others, shape) = part.drawing(), _shape_of(args, options, plain.__name__)
        if of_step is None or not shape or shape[0] % of_step.num_computed:
            return plain(*args, **options)  # not of a batch: the same on all ranks
        found = _rows(shape[0]) if "out" not in options else None
        if found is None:
            with of_this_rank(topology):
                return plain(*args, **options)
        num_drawn, rows = found
        needs_gradient = bool(options.pop("requires_grad", False))
        options.pop("size", None)
        drawn = plain(*others, (num_drawn, *shape[1:]), **options)
        return drawn[rows.to(drawn.device)].requires_grad_(needs_gradient)

    return draw


def _shape_of(args: Sequence[Any], options: Mapping[str, Any], name: str) -> tuple[list[Any], list[int]]:
    """The arguments before the shape, and the shape: of randn(2, 3), randn((2, 3)), randint(9, (2, 3))."""
    if "size" in options:
        return list(args), list(map(operator.index, options["size"]))
    if args and isinstance(args[-1], list | tuple):
        return list(args[:-1]), list(map(operator.index, args[-1]))
    return ([], []) if name == "randint" else ([], list(map(operator.index, args)))


def _of_this_rank(plain: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def draw(*args: Any, **options: Any) -> Tensor:
        of_step = part.drawing()
        with of_this_rank(topology) if of_step else nullcontext():
            return plain(*args, **options)

    return draw


def _like(plain: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def draw(input: Tensor, **options: Any) -> Tensor:
        if part.drawing() is None:
            return plain(input, **options)
        found = _rows(len(input)) if input.dim() else None
        if found is None:
            with of_this_rank(topology):
                return plain(input, **options)
        num_drawn, rows = found
        return plain(_ones(num_drawn, input), **options)[rows.to(input.device)]

    return draw


def _in_place(plain: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def draw(self: Tensor, *args: Any, **options: Any) -> Tensor:
        of_step = part.drawing()
        has_rows = self.dim() and len(self) and not isinstance(self, nn.Parameter)
        if of_step is None or not has_rows or len(self) % of_step.num_computed:
            return plain(self, *args, **options)  # not of a batch: the same on all ranks
        found = _rows(len(self)) if not any(isinstance(each, Tensor) for each in args) else None
        if found is None:
            with of_this_rank(topology):
                return plain(self, *args, **options)
        num_drawn, rows = found
        drawn = plain(_ones(num_drawn, self), *args, **options)
        with torch.no_grad():
            return self.copy_(drawn[rows.to(self.device)])

    return draw


def _attention(plain: Callable[..., Tensor], topology: Topology) -> Callable[..., Tensor]:
    @functools.wraps(plain)
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        options: dict[str, Any] = {"is_causal": is_causal, "scale": scale, "enable_gqa": enable_gqa}
        if part.drawing() is None or not dropout_p:
            return plain(query, key, value, attn_mask, dropout_p, **options)
        if query.device.type == "cpu" and not enable_gqa and not noise_kind.is_of_rank():  # a GPU's kernels draw within
            return _attend(query, key, value, attn_mask, dropout_p, is_causal, scale)
        with of_this_rank(topology):
            return plain(query, key, value, attn_mask, dropout_p, **options)

    return attention


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention with a dropout that draws by rows; each tensor is (..., length, width)."""
    root = math.sqrt(scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    scores = (query * root) @ (key * root).transpose(-2, -1)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return F.dropout(scores.softmax(-1), p) @ value


def _recurrent(plain: Callable[..., Any], topology: Topology) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        if part.drawing() is None or not self.training or not self.dropout:
            return plain(self, *args, **kwargs)
        with of_this_rank(topology):
            return plain(self, *args, **kwargs)

    return call
