"""PyTorch's layers with Keras' initial weights, so that both versions of a recipe start with the same distributions.

Glorot and Bengio, "Understanding the difficulty of training deep feedforward neural networks", 2010,
https://proceedings.mlr.press/v9/glorot10a.html
"""

from typing import TypeVar

from torch import Tensor, nn

L = TypeVar("L", nn.Linear, nn.Conv2d)


def dense(fan_in: int, fan_out: int) -> nn.Linear:
    """A linear layer."""
    return _glorot(nn.Linear(fan_in, fan_out))


def convolution(channels_in: int, channels_out: int, size: int) -> nn.Conv2d:
    """A convolution of stride 1 with padding that keeps height and width."""
    return _glorot(nn.Conv2d(channels_in, channels_out, size, padding="same"))


class FlattenChannelsLast(nn.Module):
    """Flattens (B, channels, height, width) in the order height, width, channels, as Keras does."""

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, height, width) -> (B, height * width * channels)."""
        return images.permute(0, 2, 3, 1).flatten(1)


def _glorot(layer: L) -> L:
    nn.init.xavier_uniform_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer
