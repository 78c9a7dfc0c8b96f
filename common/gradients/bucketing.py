"""Packs gradients into flat buckets, each of which is exchanged as one vector."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from common.config.schema import CompressionConfig, LossyConfig, PowerSGDConfig, ReduceOp, Scope
from common.gradients.compression import is_matrix_for_powersgd

# Large enough that latency (below 1 ms, docs/horovod-build.md) is a small part of a message's time; small enough that
# larger models have several buckets, the first of which are exchanged while backward still runs.
BUCKET_BYTES = 25 * 2**20


@dataclass(frozen=True)
class Bucket:
    """Gradients that are exchanged as one vector.

    Attributes:
        method: none, adasum or the name of a compressor.
        members: indices of the parameters, last parameter first.
        num_values: number of values of all members together.
    """

    method: str
    members: tuple[int, ...]
    num_values: int


def of_model(
    shapes: Sequence[tuple[int, ...]],
    value_bytes: int,
    compression: CompressionConfig,
    op: ReduceOp,
    max_bytes: int,
    tied: Collection[int] = (),
) -> list[Bucket]:
    """The buckets of a model's gradients.

    The last bucket is uncompressed, because scalars are appended to it; it may have no members.

    Args:
        shapes: the shapes of the parameters, in the model's order.
        value_bytes: bytes of one value.
        compression: the compression of gradients that are large enough for it.
        op: adasum applies to all gradients; none is then compressed.
        max_bytes: largest size of a bucket that holds several gradients.
        tied: indices of the parameters that stages share. They are never compressed: the gradients of the stages are
            summed exactly, and a checkpoint has no name for the residual of one stage.
    """
    numels = [math.prod(shape) for shape in shapes]
    if op is ReduceOp.adasum:
        method, chosen = op.name, list(range(len(shapes)))
    else:
        compressed_ones = [i for i, shape in enumerate(shapes) if _is_compressed(shape, compression)]
        method, chosen = compression.name, [i for i in compressed_ones if i not in tied]
    is_by_layer = isinstance(compression, LossyConfig) and compression.scope is Scope.layer
    is_by_layer = is_by_layer and not isinstance(compression, PowerSGDConfig)  # PowerSGD sends all matrices together
    plain = sorted(set(range(len(shapes))) - set(chosen))
    compressed = _packed(chosen, numels, value_bytes, 0 if is_by_layer else max_bytes)
    return [
        *(Bucket(method, members, sum(numels[i] for i in members)) for members in compressed),
        *(
            Bucket("none", members, sum(numels[i] for i in members))
            for members in _packed(plain, numels, value_bytes, max_bytes) or [()]
        ),
    ]


def members_without(method: str, buckets: Sequence[Bucket]) -> list[int]:
    """The indices of the parameters whose gradients are exchanged by another method."""
    return [index for bucket in buckets if bucket.method != method for index in bucket.members]


def _is_compressed(shape: tuple[int, ...], cfg: CompressionConfig) -> bool:
    if not isinstance(cfg, LossyConfig) or math.prod(shape) < cfg.min_numel:
        return False
    return not isinstance(cfg, PowerSGDConfig) or is_matrix_for_powersgd(shape, cfg.rank)


def _packed(indices: Sequence[int], numels: Sequence[int], value_bytes: int, max_bytes: int) -> list[tuple[int, ...]]:
    assigned = assign([numels[index] * value_bytes for index in indices], max_bytes)
    return [tuple(indices[place] for place in places) for places in assigned]


def assign(num_bytes: Sequence[int], bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Packs parameters into buckets, last parameter first: backward finishes the gradients in that order.

    Args:
        num_bytes: bytes of each parameter's gradient, in the model's order.
        bucket_bytes: largest size of a bucket; a larger gradient gets a separate bucket.

    Returns:
        The parameters' indices, bucket by bucket.
    """
    buckets: list[list[int]] = []
    room = 0
    for index in reversed(range(len(num_bytes))):
        if not buckets or num_bytes[index] > room:
            buckets.append([])
            room = bucket_bytes
        buckets[-1].append(index)
        room -= num_bytes[index]
    return buckets


def allreduce_bytes(num_bytes: int, num_ranks: int) -> int:
    """Bytes that a rank sends in a ring allreduce of num_bytes bytes.

    The message has N parts. Each of the N ranks sends N - 1 parts to reduce and N - 1 to gather. Source: Patarasuk
    and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002
    """
    return round(2 * (num_ranks - 1) / num_ranks * num_bytes)
