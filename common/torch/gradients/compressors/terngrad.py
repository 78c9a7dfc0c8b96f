"""-1, 0 or 1 times a scale."""

from common.config.schema import TernGradConfig
from common.torch.gradients.compression import CompressionGroup
from common.torch.gradients.compressors.qsgd import RandomRounding

import torch
from torch import Tensor


class Compressor(RandomRounding):
    """Stochastic rounding to two bits per value, after clipping; common/gradients/compression.py, TernGrad."""

    bits = 2

    def __init__(self, cfg: TernGradConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._clip = cfg.clip

    def quantize(self, chunks: Tensor, sizes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The scale is the largest magnitude after clipping."""
        if self._clip:
            squares = chunks.double().square().sum(-1) / sizes
            bounds = (self._clip * squares.sqrt()).float()[..., None]
            chunks = chunks.clamp(-bounds, bounds)
        return super().quantize(chunks, sizes, random)
