"""Functions that are more precise than Keras' versions."""

import tensorflow as tf


def gelu(x: tf.Tensor) -> tf.Tensor:
    """GELU: x times the standard normal distribution function; tf.nn.gelu rounds a factor to float32 in float64."""
    return 0.5 * x * (1 + tf.math.erf(x * 0.5**0.5))
