"""A few bits a value, rounded at random."""

from common.config import QSGDConfig
from common.torch.compression import ScaledCodec, Unit, where_positive

import torch
from torch import Tensor


class RandomRounding(ScaledCodec):
    """Rounds up or down at random so that the mean is right; common/compression.py, QSGD."""

    def quantize(self, chunks: Tensor, sizes: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
        """The scale is the largest magnitude."""
        scales, steps = chunks.abs().amax(-1), 2 ** (self.bits - 1) - 1
        exact = chunks / where_positive(scales)[..., None] * steps
        uniforms = torch.rand(chunks.shape, generator=random, device=chunks.device)
        return scales, (torch.floor(exact + uniforms).clamp(-steps, steps) + steps).to(torch.uint8)

    def dequantize(self, scales: Tensor, integers: Tensor) -> Tensor:
        """Steps times the scale over the number of steps."""
        steps = 2 ** (self.bits - 1) - 1
        return (integers - steps) * (scales / steps)


class Compressor(RandomRounding):
    """QSGD with compression.bits."""

    def __init__(self, cfg: QSGDConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self.bits = cfg.bits
