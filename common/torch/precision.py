"""What is computed in which dtype."""

from collections.abc import Sequence

from common.config import PrecisionConfig
from common.torch import runtime

import torch
from torch import Tensor, nn


class Model(nn.Sequential):
    """Layers, one after another, whose products of matrices and convolutions are made in the compute dtype.

    Weights and outputs have the dtype of the weights, so that losses are summed and gradients are kept in it.

    Args:
        layers: in order.
        cfg: the dtypes.
        device: where the weights are to be.
    """

    def __init__(self, layers: Sequence[nn.Module], cfg: PrecisionConfig, device: torch.device) -> None:
        super().__init__(*layers)
        self.to(device, runtime.dtype(cfg))
        self._device_type, self._compute_dtype = device.type, getattr(torch, cfg.compute_dtype.name)
        self._is_mixed = cfg.compute_dtype is not cfg.dtype

    def forward(self, inputs: Tensor) -> Tensor:
        """The last layer's outputs."""
        if not self._is_mixed:
            return super().forward(inputs)
        with torch.autocast(self._device_type, self._compute_dtype):
            return super().forward(inputs).float()
