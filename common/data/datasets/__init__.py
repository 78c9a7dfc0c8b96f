"""The sources of examples. Every source has a training set and a test set."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from common.config.schema import (
    DataConfig,
    ImagesConfig,
    ImageShardsConfig,
    LanguageConfig,
    LinearDataConfig,
    MnistConfig,
    TextConfig,
    TextShardsConfig,
)
from common.data.datasets import digits, mnist, shards, text
from common.data.datasets.augment import Augmented
from common.data.datasets.split import ImageDataset
from common.data.datasets.text import Corpus, Windows
from common.distributed.topology import Topology
from common.errors import ConfigError

__all__ = ["SOURCES", "Augmented", "Corpus", "ImageDataset", "Windows", "load_images", "load_text", "prepare"]

Loader = TypeVar("Loader", bound=Callable[..., object])

# For each name of an option in conf/data: the type of its configuration, and the function that loads its examples.
IMAGES: dict[str, tuple[type[ImagesConfig], Callable[..., tuple[ImageDataset, ImageDataset]]]] = {
    "digits": (ImagesConfig, lambda _: digits.load()),
    "image_shards": (ImageShardsConfig, shards.load_images),
    "mnist": (MnistConfig, lambda cfg: mnist.load(cfg.root)),
}
TEXTS: dict[str, tuple[type[LanguageConfig], Callable[..., Corpus]]] = {
    "text": (TextConfig, text.load),
    "text_shards": (TextShardsConfig, shards.load_text),
}
SOURCES: dict[str, type] = {
    **{name: kind for name, (kind, _) in (IMAGES | TEXTS).items()},
    "linear": LinearDataConfig,  # loaded by common/data/datasets/linear.py; only one task uses it
}


def prepare(cfg: DataConfig, topology: Topology) -> None:
    """Downloads missing files of the source to the host, and verifies shards; every rank must call it.

    One rank per host downloads; the ranks of a host divide the shards among themselves.

    Raises:
        ConfigError: a file cannot be downloaded, or shards are damaged.
    """
    if isinstance(cfg, MnistConfig) and cfg.root is None and topology.local_rank == 0:
        mnist.fetch(mnist.cache_folder())
    elif isinstance(cfg, ImageShardsConfig | TextShardsConfig):
        kind = "images" if isinstance(cfg, ImageShardsConfig) else "text"
        shards.verify(shards.open_index(cfg.path, kind), cfg.verify, topology.local_rank, topology.local_size)


def load_images(cfg: ImagesConfig) -> tuple[ImageDataset, ImageDataset]:
    """The training and the test set of an image source; prepare() must have been called.

    Raises:
        ConfigError: files are missing or damaged, or there is no such source.
    """
    return _loader(IMAGES, cfg)(cfg)


def load_text(cfg: LanguageConfig, context: int) -> Corpus:
    """The text of a source, in examples of `context` tokens; prepare() must have been called.

    Raises:
        ConfigError: files are missing or damaged, or too short for one example, or there is no such source.
    """
    return _loader(TEXTS, cfg)(cfg, context)


def _loader(sources: Mapping[str, tuple[type, Loader]], cfg: DataConfig) -> Loader:
    kind, loader = sources.get(cfg.name, (None, None))
    if kind is not type(cfg) or loader is None:
        what = f"a {type(cfg).__name__} of this name"
        raise ConfigError([f"data={cfg.name}: there is no code for {what}; choose {'|'.join(sources)}"])
    return loader
