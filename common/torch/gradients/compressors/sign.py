"""One bit per value."""

from common.torch.gradients.compression import ScaledCodec

import torch
from torch import Tensor


class Compressor(ScaledCodec):
    """Plus or minus the chunk's mean magnitude; common/gradients/compression.py, Sign."""

    bits = 1

    def quantize(self, chunks: Tensor, sizes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The scale is the mean magnitude."""
        scales = chunks.abs().sum(-1, dtype=torch.float64) / sizes
        return scales.float(), (chunks >= 0).to(torch.uint8)

    def dequantize(self, scales: Tensor, integers: Tensor) -> Tensor:
        """Plus or minus the scale."""
        return (2 * integers - 1) * scales
