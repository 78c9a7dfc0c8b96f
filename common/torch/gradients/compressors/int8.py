"""Eight bits per value."""

from common.torch.gradients.compression import ScaledCodec, where_positive

import torch
from torch import Tensor


class Compressor(ScaledCodec):
    """Rounds to the nearest of 255 steps; common/gradients/compression.py, Int8."""

    bits = 8

    def quantize(self, chunks: Tensor, sizes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The scale is one step."""
        scales = chunks.abs().amax(-1) * (1 / 127)
        return scales, (torch.round(chunks / where_positive(scales)[..., None]) + 127).to(torch.uint8)

    def dequantize(self, scales: Tensor, integers: Tensor) -> Tensor:
        """The number of steps times the scale."""
        return (integers - 127) * scales
