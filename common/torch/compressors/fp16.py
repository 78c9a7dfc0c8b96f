"""IEEE half precision on the wire."""

from common.torch.compression import Codec, as_bytes, from_bytes, to_wire

import torch
from torch import Tensor


class Compressor(Codec):
    """Rounds to half precision; common/compression.py, Float16."""

    def encode(self, pieces: Tensor, random: torch.Generator) -> Tensor:
        """Two bytes a value."""
        return as_bytes(to_wire(pieces, torch.float16))

    def decode(self, codes: Tensor, size: int) -> Tensor:
        """Exact."""
        return from_bytes(codes, torch.float16).float()
