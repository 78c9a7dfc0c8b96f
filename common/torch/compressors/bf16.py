"""bfloat16 on the wire, as bytes: Horovod has no such dtype."""

from common.torch.compression import Codec, as_bytes, from_bytes

import torch
from torch import Tensor


class Compressor(Codec):
    """Rounds to bfloat16; common/compression.py, BFloat16."""

    def encode(self, pieces: Tensor, random: torch.Generator) -> Tensor:
        """Two bytes a value."""
        return as_bytes(pieces.bfloat16())

    def decode(self, codes: Tensor, size: int) -> Tensor:
        """Exact."""
        return from_bytes(codes, torch.bfloat16).float()
