"""IEEE half precision in messages."""

from common.torch.gradients.compression import Codec, as_bytes, from_bytes, to_wire

import torch
from torch import Tensor


class Compressor(Codec):
    """Rounds to half precision; common/gradients/compression.py, Float16."""

    def encode(self, pieces: Tensor, random: torch.Generator) -> Tensor:
        """Two bytes per value."""
        return as_bytes(to_wire(pieces, torch.float16))

    def decode(self, codes: Tensor, size: int) -> Tensor:
        """The values as float32."""
        return from_bytes(codes, torch.float16).float()
