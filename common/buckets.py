"""How gradients are packed into flat buckets, each exchanged as one message."""

from collections.abc import Sequence

from common.config import Dtype

# Large enough that a message's latency (below 1 ms, docs/horovod-build.md) is a small part of its time, small enough
# that a model of more than one bucket has something to exchange while backward still runs.
BUCKET_BYTES = 25 * 2**20


def assign(num_bytes: Sequence[int], bucket_bytes: int = BUCKET_BYTES) -> list[list[int]]:
    """Packs parameters into buckets, last parameter first, as backward finishes the gradients in that order.

    Args:
        num_bytes: size of each parameter's gradient, in the model's order.
        bucket_bytes: a bucket is closed before it would exceed this; a larger gradient gets a bucket of its own.

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


def allreduce_bytes(num_values: int, dtype: Dtype, num_replicas: int) -> int:
    """Bytes that a rank sends in a ring allreduce of so many values.

    Each of the N ranks sends 2 (N - 1) of the message's N parts: N - 1 to reduce, N - 1 to gather. Source: Patarasuk
    and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009,
    https://doi.org/10.1016/j.jpdc.2008.09.002
    """
    return round(2 * (num_replicas - 1) / num_replicas * num_values * dtype.num_bytes)
