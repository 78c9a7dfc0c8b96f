"""Exchanges named arrays between ranks, in messages of limited size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

Arrays = Mapping[str, np.ndarray]
PIECE_BYTES = 2**25  # several copies of a message exist at a time: as arrays, packed, sent and received


def exchange(
    outgoing: Sequence[Arrays],
    alltoall: Callable[[Sequence[bytes]], Sequence[bytes]],
    allgather_object: Callable[[Any], list[Any]],
) -> list[dict[str, np.ndarray]]:
    """Sends named arrays to each rank; returns the arrays received from each rank.

    Args:
        outgoing: for each rank, the arrays to send to it.
        alltoall: sends bytes to each rank and returns the bytes received from each.
        allgather_object: returns each rank's value on all ranks.
    """
    pieces = [list(_pieces(arrays)) for arrays in outgoing]
    num_messages = max(allgather_object(max(map(len, pieces))))
    received: list[dict[str, np.ndarray]] = [{} for _ in outgoing]
    for number in range(num_messages):
        contents = [safetensors.numpy.save(to[number]) if number < len(to) else b"" for to in pieces]
        for arrays, content in zip(received, alltoall(contents), strict=True):
            arrays.update(safetensors.numpy.load(content) if content else {})
    return received


def _pieces(arrays: Arrays) -> Iterator[dict[str, np.ndarray]]:
    """All arrays, in pieces that each end with the array that reaches PIECE_BYTES."""
    piece: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        piece[name] = array
        if sum(member.nbytes for member in piece.values()) >= PIECE_BYTES:
            yield piece
            piece = {}
    if piece:
        yield piece
