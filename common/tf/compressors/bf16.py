"""bfloat16 on the wire, as bytes: Horovod has no such dtype."""

from common.tf.compression import Codec, Random, as_bytes, from_bytes

import tensorflow as tf


class Compressor(Codec):
    """Rounds to bfloat16; common/compression.py, BFloat16."""

    def encode(self, pieces: tf.Tensor, random: Random) -> tf.Tensor:
        """Two bytes a value."""
        return as_bytes(tf.cast(pieces, tf.bfloat16))

    def decode(self, codes: tf.Tensor, size: int) -> tf.Tensor:
        """Exact."""
        return tf.cast(from_bytes(codes, tf.bfloat16), tf.float32)
