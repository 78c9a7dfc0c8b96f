"""IEEE half precision in messages."""

from common.tf.gradients.compression import Codec, Random, as_bytes, from_bytes, to_wire

import tensorflow as tf


class Compressor(Codec):
    """Rounds to half precision; common/gradients/compression.py, Float16."""

    def encode(self, pieces: tf.Tensor, random: Random) -> tf.Tensor:
        """Two bytes per value."""
        return as_bytes(to_wire(pieces, tf.float16))

    def decode(self, codes: tf.Tensor, size: int) -> tf.Tensor:
        """The values as float32."""
        return tf.cast(from_bytes(codes, tf.float16), tf.float32)
