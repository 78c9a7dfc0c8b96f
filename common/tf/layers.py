"""What Keras' own layers lack."""

import tensorflow as tf


def gelu(x: tf.Tensor) -> tf.Tensor:
    """The standard normal distribution function of x, times x; tf.nn.gelu rounds a factor to float32 in float64 too."""
    return 0.5 * x * (1 + tf.math.erf(x * 0.5**0.5))
