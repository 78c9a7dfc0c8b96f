"""bfloat16 in messages."""

from common.torch.gradients.compression import Codec, as_bytes, from_bytes

import torch
from torch import Tensor


class Compressor(Codec):
    """Rounds to bfloat16; common/gradients/compression.py, BFloat16."""

    def encode(self, pieces: Tensor, random: torch.Generator) -> Tensor:
        """Two bytes per value."""
        return as_bytes(pieces.bfloat16())

    def decode(self, codes: Tensor, size: int) -> Tensor:
        """The values as float32."""
        return from_bytes(codes, torch.bfloat16).float()
