"""A few bits per value, by stochastic rounding."""

from common.config.schema import QSGDConfig
from common.torch.gradients.compression import CompressionGroup, ScaledCodec, where_positive

import torch
from torch import Tensor


class RandomRounding(ScaledCodec):
    """Unbiased stochastic rounding; common/gradients/compression.py, QSGD."""

    def quantize(self, chunks: Tensor, sizes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The scale is the largest magnitude."""
        scales, steps = chunks.abs().amax(-1), 2 ** (self.bits - 1) - 1
        exact = chunks / where_positive(scales)[..., None] * steps
        uniforms = torch.rand(chunks.shape, generator=random, device=chunks.device)
        return scales, (torch.floor(exact + uniforms).clamp(-steps, steps) + steps).to(torch.uint8)

    def dequantize(self, scales: Tensor, integers: Tensor) -> Tensor:
        """The number of steps times scale / steps."""
        steps = 2 ** (self.bits - 1) - 1
        return (integers - steps) * (scales / steps)


class Compressor(RandomRounding):
    """QSGD with compression.bits."""

    def __init__(self, cfg: QSGDConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self.bits = cfg.bits
