"""The values of largest magnitude."""

from common.compression import num_chosen
from common.config import SparseConfig
from common.torch.compression import Sparse, Unit

from torch import Tensor


class Compressor(Sparse):
    """A share of the values, by magnitude; common/compression.py, top_k()."""

    def __init__(self, cfg: SparseConfig, unit: Unit) -> None:
        super().__init__(cfg, unit)
        self._ratio = cfg.ratio

    def choose(self, values: Tensor, step: int) -> Tensor:
        """The largest ones."""
        return values.abs().topk(num_chosen(len(values), self._ratio), sorted=False).indices
