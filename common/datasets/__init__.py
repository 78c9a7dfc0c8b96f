"""The sources of examples. Every source gives a training and a test set."""

from collections.abc import Callable, Mapping
from typing import TypeVar

from common.config import (
    ConfigError,
    DataConfig,
    ImagesConfig,
    ImageShardsConfig,
    LanguageConfig,
    LinearDataConfig,
    MnistConfig,
    TextConfig,
    TextShardsConfig,
)
from common.datasets import digits, mnist, shards, text
from common.datasets.split import Split
from common.datasets.text import Corpus
from common.topology import Topology

__all__ = ["SOURCES", "Corpus", "Split", "load_images", "load_text", "prepare"]

Loader = TypeVar("Loader", bound=Callable[..., object])

# What the name of an option of conf/data stands for: the type of its configuration, and what loads its examples.
IMAGES: dict[str, tuple[type[ImagesConfig], Callable[..., tuple[Split, Split]]]] = {
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
    "linear": LinearDataConfig,  # common/datasets/linear.py gives measurements, which one task alone takes
}


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
        ConfigError: files are missing or damaged, or there is no such source.
    """
    return _loader(IMAGES, cfg)(cfg)


def load_text(cfg: LanguageConfig, context: int) -> Corpus:
    """The text of a source that has been prepared, in examples of `context` tokens.

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
