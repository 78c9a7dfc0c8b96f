"""A language model from a checkpoint, to generate text."""

from collections.abc import Mapping, Sequence

from common.config.schema import LMConfig
from common.tf.models.transformer import Decoder
from common.tf.training.checkpoint import load_weights

import keras
import numpy as np


def restored_decoder(layers: Sequence[keras.Layer], cfg: LMConfig, weights: Mapping[str, np.ndarray]) -> Decoder:
    """A decoder with the weights of a checkpoint from either framework.

    Raises:
        ConfigError: the weights belong to another model.
    """
    load_weights(keras.Sequential([keras.Input((cfg.context,), dtype="int64"), *layers]), weights)
    return Decoder(layers, cfg)
