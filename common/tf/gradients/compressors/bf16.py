"""bfloat16 in messages."""

from common.tf.gradients.compression import Codec, Random, as_bytes, from_bytes

import tensorflow as tf


class Compressor(Codec):
    """Rounds to bfloat16; common/gradients/compression.py, BFloat16."""

    def encode(self, pieces: tf.Tensor, random: Random) -> tf.Tensor:
        """Two bytes per value."""
        return as_bytes(tf.cast(pieces, tf.bfloat16))

    def decode(self, codes: tf.Tensor, size: int) -> tf.Tensor:
        """The values as float32."""
        return tf.cast(from_bytes(codes, tf.bfloat16), tf.float32)
