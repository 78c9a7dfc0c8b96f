"""The tf recipes' work without the recipes: Keras' own compile and fit on one rank."""

import time
from typing import Any

from common.config.schema import RunConfig, TransformerLMConfig
from common.data import datasets
from common.data.datasets.augment import Augmented
from common.data.datasets.examples import Examples
from common.data.sampler import TrainingSampler
from common.tf.distributed import runtime
from common.tf.gradients import optimizers
from recipes import mnist_cnn_tf, mnist_mlp_tf, transformer_lm_tf

import keras
import numpy as np

RECIPES = {"mnist_mlp": mnist_mlp_tf, "mnist_cnn": mnist_cnn_tf, "transformer_lm": transformer_lm_tf}


class Batches(keras.utils.PyDataset):
    """The recipe's batches in its order."""

    def __init__(self, cfg: RunConfig, examples: Examples) -> None:
        super().__init__()
        self._examples = examples
        self._steps = list(TrainingSampler.from_config(cfg, len(examples), runtime.init()).steps())

    def __len__(self) -> int:
        return len(self._steps)

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        step = self._steps[number]
        return self._examples.get_batch(step.examples, step.epoch)


class Clock(keras.callbacks.Callback):
    """Seconds from the end of one step to the end of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.ends: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Notes the time."""
        self.ends.append(time.perf_counter())


def task(name: str, cfg: Any) -> tuple[keras.Model, Examples]:
    """The recipe's model and training examples."""
    recipe: Any = RECIPES[name]
    if isinstance(cfg, TransformerLMConfig):
        corpus = datasets.load_text(cfg.data, cfg.model.context)
        layers = recipe.build_layers(cfg.model, corpus.tokenizer.vocabulary_size)
        return keras.Sequential([keras.Input((cfg.model.context,), dtype="int64"), *layers]), corpus.train
    images, _ = datasets.load_images(cfg.data)
    model = keras.Sequential([keras.Input((28, 28)), *recipe.build_layers(cfg.model)])
    return model, Augmented(images, cfg.data, cfg.seed)


def fit(name: str, cfg: RunConfig) -> list[float]:
    """model.compile and model.fit at their defaults."""
    runtime.init()
    keras.utils.set_random_seed(cfg.seed)
    model, examples = task(name, cfg)
    optimizer = optimizers.build(cfg.optimizer, model)
    optimizer.global_clipnorm = cfg.train.clip_norm
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    clock = Clock()
    model.fit(Batches(cfg, examples), epochs=1, shuffle=False, verbose=0, callbacks=[clock])
    return np.diff(clock.ends).tolist()
