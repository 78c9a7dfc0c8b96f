"""A language model from a checkpoint, to generate text."""

from collections.abc import Mapping, Sequence

from common.config.schema import LMConfig
from common.torch.models.transformer import Decoder
from common.torch.training.checkpoint import load_weights

import numpy as np
from torch import nn


def restored_decoder(layers: Sequence[nn.Module], cfg: LMConfig, weights: Mapping[str, np.ndarray]) -> Decoder:
    """A decoder with the weights of a checkpoint from either framework.

    Raises:
        ConfigError: the weights belong to another model.
    """
    load_weights(nn.Sequential(*layers), weights)
    return Decoder(layers, cfg)
