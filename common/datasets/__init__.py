"""The sources of examples. Every source gives a training and a test split."""

from common.config import DataConfig, MnistConfig
from common.datasets import digits, mnist
from common.datasets.split import Split
from common.topology import Topology

__all__ = ["Split", "load_images", "prepare"]


def prepare(cfg: DataConfig, topology: Topology) -> None:
    """Fetches what the source needs and the host does not have; done by one rank per host.

    Raises:
        ConfigError: it cannot be fetched.
    """
    if isinstance(cfg, MnistConfig) and cfg.root is None and topology.local_rank == 0:
        mnist.fetch(mnist.cache_folder())


def load_images(cfg: DataConfig) -> tuple[Split, Split]:
    """The training and the test split of a source that has been fetched.

    Raises:
        ConfigError: files are missing or damaged.
    """
    if isinstance(cfg, MnistConfig):
        return mnist.load(cfg.root)
    return digits.load()
