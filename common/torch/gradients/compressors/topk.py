"""The values of largest magnitude."""

from common.config.schema import SparseConfig
from common.gradients.compression import num_sent
from common.torch.gradients.compression import CompressionGroup, Sparse

from torch import Tensor


class Compressor(Sparse):
    """The fraction cfg.ratio of the values, by magnitude; common/gradients/compression.py, top_k()."""

    def __init__(self, cfg: SparseConfig, group: CompressionGroup) -> None:
        super().__init__(cfg, group)
        self._ratio = cfg.ratio

    def choose(self, values: Tensor, step: int) -> Tensor:
        """The indices of the largest magnitudes."""
        return values.abs().topk(num_sent(len(values), self._ratio), sorted=False).indices
