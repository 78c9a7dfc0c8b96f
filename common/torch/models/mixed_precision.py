"""Mixed precision."""

from collections.abc import Sequence

from common.config.schema import PrecisionConfig
from common.torch.distributed import runtime

import torch
from torch import Tensor, nn


class Model(nn.Sequential):
    """A sequence of layers whose matrix products and convolutions run in the compute dtype.

    Weights and outputs have the weight dtype, so that losses and gradients have it, too.

    Args:
        layers: the layers, in order.
        cfg: the dtypes.
        device: the device of the weights.
    """

    def __init__(self, layers: Sequence[nn.Module], cfg: PrecisionConfig, device: torch.device) -> None:
        super().__init__(*layers)
        self.to(device, runtime.dtype(cfg))
        self._device_type, self._compute_dtype = device.type, getattr(torch, cfg.compute_dtype.name)
        self._is_mixed = cfg.compute_dtype is not cfg.dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """The outputs of the last layer."""
        if not self._is_mixed:
            return super().forward(inputs)
        with torch.autocast(self._device_type, self._compute_dtype):
            return super().forward(inputs).float()
