"""Named arrays on their way from rank to rank, in messages of limited size."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import safetensors.numpy

Arrays = Mapping[str, np.ndarray]
PIECE_BYTES = 2**25  # a message exists several times on its way: as arrays, packed, sent and received


def exchange(
    outgoing: Sequence[Arrays],
    alltoall: Callable[[Sequence[bytes]], Sequence[bytes]],
    gather_json: Callable[[Any], list[Any]],
) -> list[dict[str, np.ndarray]]:
    """Sends named arrays to each rank, by its number; returns those that came from each.

    Args:
        outgoing: for each rank.
        alltoall: sends bytes to each rank and returns those that came from each.
        gather_json: gives each rank's value to all ranks.
    """
    pieces = [list(_pieces(arrays)) for arrays in outgoing]
    num_messages = max(gather_json(max(map(len, pieces))))
    received: list[dict[str, np.ndarray]] = [{} for _ in outgoing]
    for number in range(num_messages):
        contents = [safetensors.numpy.save(to[number]) if number < len(to) else b"" for to in pieces]
        for arrays, content in zip(received, alltoall(contents), strict=True):
            arrays.update(safetensors.numpy.load(content) if content else {})
    return received


def _pieces(arrays: Arrays) -> Iterator[dict[str, np.ndarray]]:
    """All arrays, in parts that end where they reach PIECE_BYTES."""
    piece: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        piece[name] = array
        if sum(member.nbytes for member in piece.values()) >= PIECE_BYTES:
            yield piece
            piece = {}
    if piece:
        yield piece
