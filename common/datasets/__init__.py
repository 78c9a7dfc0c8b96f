"""The sources of examples. Every source gives a training and a test set."""

from common.config import (
    DataConfig,
    ImagesConfig,
    ImageShardsConfig,
    LanguageConfig,
    MnistConfig,
    TextConfig,
    TextShardsConfig,
)
from common.datasets import digits, mnist, shards, text
from common.datasets.split import Split
from common.datasets.text import Corpus
from common.topology import Topology

__all__ = ["Corpus", "Split", "load_images", "load_text", "prepare"]


def prepare(cfg: DataConfig, topology: Topology) -> None:
    """Fetches what the source needs and the host does not have, and verifies shards; to be called by every rank.

    One rank per host fetches; the ranks of a host share the shards out.

    Raises:
        ConfigError: something cannot be fetched, or shards are damaged.
    """
    if isinstance(cfg, MnistConfig) and cfg.root is None and topology.local_rank == 0:
        mnist.fetch(mnist.cache_folder())
    elif isinstance(cfg, ImageShardsConfig | TextShardsConfig):
        kind = "images" if isinstance(cfg, ImageShardsConfig) else "text"
        shards.verify(shards.open_index(cfg.path, kind), cfg.verify, topology.local_rank, topology.local_size)


def load_images(cfg: ImagesConfig) -> tuple[Split, Split]:
    """The training and the test split of a source of images that has been prepared.

    Raises:
        ConfigError: files are missing or damaged.
    """
    if isinstance(cfg, MnistConfig):
        return mnist.load(cfg.root)
    if isinstance(cfg, ImageShardsConfig):
        return shards.load_images(cfg)
    return digits.load()


def load_text(cfg: LanguageConfig, context: int) -> Corpus:
    """The text of a source that has been prepared, in examples of `context` tokens.

    Raises:
        ConfigError: files are missing or damaged, or too short for one example.
    """
    if isinstance(cfg, TextShardsConfig):
        return shards.load_text(cfg, context)
    if isinstance(cfg, TextConfig):
        return text.load(cfg, context)
    raise TypeError(f"no text comes from {type(cfg).__name__}")
