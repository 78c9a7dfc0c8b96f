"""The layers of a decoder-only transformer language model.

Vaswani et al., "Attention Is All You Need", 2017, https://arxiv.org/abs/1706.03762, with the norms before the sublayers
and the initial weights of GPT-2: Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf, and their code,
https://github.com/openai/gpt-2/blob/master/src/model.py.

Shapes: B examples, T tokens, W width, N heads, H = W / N, V vocabulary size, S tokens that are attended to.
"""

from collections.abc import Sequence

from common.config.schema import LMConfig
from common.tf.models.layers import gelu
from common.training.sampling import Window

import keras
import numpy as np
import tensorflow as tf

EPSILON = 1e-5  # epsilon of the layer norms
DEVIATION = 0.02  # standard deviation of initial weights
POSITION_DEVIATION = 0.01


class KeyValueCache:
    """The keys and values of one layer, for all positions of the context."""

    def __init__(self, num_heads: int, head_width: int, context: int, dtype: str) -> None:
        shape = (1, context, num_heads, head_width)
        self.keys, self.values = (tf.Variable(tf.zeros(shape, dtype), trainable=False) for _ in range(2))

    def extend(self, keys: tf.Tensor, values: tf.Tensor, position: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Stores keys and values (1, T, N, H) of T tokens, the first of which is at `position`.

        Returns:
            All keys and values (1, S, N, H), where S is the whole context, and the attention mask (T, S) bool.
        """
        end = position + tf.shape(keys)[1]
        self.keys[:, position:end].assign(keys)
        self.values[:, position:end].assign(values)
        places = tf.range(self.keys.shape[1])
        return self.keys.read_value(), self.values.read_value(), places <= tf.range(position, end)[:, None]


class Embedding(keras.Layer):
    """Token and learned position embeddings: tokens (B, T) int64 -> (B, T, W)."""

    def __init__(self, vocabulary_size: int, context: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = keras.layers.Embedding(vocabulary_size, width, normal(DEVIATION), name="token")
        self.position = keras.layers.Embedding(context, width, normal(POSITION_DEVIATION), name="position")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")

    def build(self, input_shape: Sequence[int | None]) -> None:
        """Creates the weights: call() uses them without calling the layers."""
        self.token.build()
        self.position.build()

    def call(self, tokens: tf.Tensor, position: tf.Tensor | int = 0) -> tf.Tensor:
        """Embeds tokens, the first of which is at `position`."""
        positions = self.position.embeddings[position : position + keras.ops.shape(tokens)[1]]  # (T, W)
        return self.dropout(tf.gather(dense_gradient(self.token.embeddings), tokens) + positions)


class Attention(keras.Layer):
    """Causal self-attention with several heads: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_heads: int, num_layers: int, name: str) -> None:
        super().__init__(name=name)
        self.num_heads = num_heads
        self.scale = np.float64((width // num_heads) ** -0.5)  # Keras' default scale is rounded to float32
        self.qkv = dense(3 * width, "qkv")
        self.projection = dense(width, "projection", residual_deviation(num_layers))

    def call(self, x: tf.Tensor, cache: KeyValueCache | None = None, position: tf.Tensor | int = 0) -> tf.Tensor:
        """Each token attends to itself and the tokens before it, cached ones included."""
        num_examples, num_tokens, width = keras.ops.shape(x)
        heads = (num_examples, num_tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = tf.unstack(tf.reshape(self.qkv(x), heads), axis=2)  # (B, T, N, H) each
        if cache is None:
            mixed = keras.ops.dot_product_attention(query, key, value, scale=self.scale, is_causal=True)
        else:
            key, value, mask = cache.extend(key, value, position)
            mixed = keras.ops.dot_product_attention(query, key, value, mask=mask[None, None], scale=self.scale)
        return self.projection(tf.reshape(mixed, (num_examples, num_tokens, width)))


class MLP(keras.Layer):
    """Two linear layers with a hidden width of 4 W: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_layers: int, name: str) -> None:
        super().__init__(name=name)
        self.hidden = dense(4 * width, "hidden")
        self.projection = dense(width, "projection", residual_deviation(num_layers))

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """Applies both layers, with the exact GELU (by the error function) in between."""
        return self.projection(gelu(self.hidden(x)))


class Block(keras.Layer):
    """Attention and MLP, each with a residual connection: (B, T, W) -> (B, T, W)."""

    def __init__(self, width: int, num_heads: int, dropout: float, num_layers: int) -> None:
        super().__init__()
        self.attention_norm = keras.layers.LayerNormalization(epsilon=EPSILON, name="attention_norm")
        self.attention = Attention(width, num_heads, num_layers, name="attention")
        self.mlp_norm = keras.layers.LayerNormalization(epsilon=EPSILON, name="mlp_norm")
        self.mlp = MLP(width, num_layers, name="mlp")
        self.dropout = keras.layers.Dropout(dropout, name="dropout")

    def call(self, x: tf.Tensor, cache: KeyValueCache | None = None, position: tf.Tensor | int = 0) -> tf.Tensor:
        """Applies attention and MLP."""
        x = x + self.dropout(self.attention(self.attention_norm(x), cache=cache, position=position))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Head(keras.Layer):
    """Final norm and logits of the next token: (..., W) -> (..., V).

    Args:
        width: W.
        vocabulary_size: V.
        embedding: its token embedding is used as the weights (Press and Wolf, "Using the Output Embedding to Improve
            Language Models", 2017, https://arxiv.org/abs/1608.05859); None: the head has separate weights.
    """

    def __init__(self, width: int, vocabulary_size: int, embedding: Embedding | None = None) -> None:
        super().__init__()
        self.norm = keras.layers.LayerNormalization(epsilon=EPSILON, name="norm")
        self.tied = embedding is not None
        if embedding is not None:
            self.token = embedding.token
        else:
            self.projection = dense(vocabulary_size, "projection", bias=False)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        """The logits (..., V)."""
        x = self.norm(x)
        if not self.tied:
            return self.projection(x)
        # A matrix product, in backward, too; tf.einsum("...w,vw->...v") makes the whole step several times slower.
        return tf.tensordot(x, tf.cast(self.token.embeddings, x.dtype), [[-1], [1]])


class Decoder:
    """Runs the model token by token, with cached keys and values of earlier tokens.

    Args:
        layers: Embedding, Blocks, Head, with built weights; they run in evaluation mode.
        cfg: the model's sizes.
    """

    def __init__(self, layers: Sequence[keras.Layer], cfg: LMConfig) -> None:
        self._layers = list(layers)
        self._caches = [
            KeyValueCache(cfg.num_heads, cfg.width // cfg.num_heads, cfg.context, self._layers[0].compute_dtype)
            for _ in range(cfg.num_layers)
        ]
        self._window = Window(cfg.context)

    def feed(self, token_ids: np.ndarray) -> np.ndarray:
        """The logits (V,) of the token that follows all tokens so far.

        Args:
            token_ids: (T,) integers, at least one; see Window in common/training/sampling.py for the context.
        """
        tokens, position = self._window.add(token_ids)
        logits = self._forward(tf.constant(tokens)[None], tf.constant(position))
        return logits.numpy()[0]

    @tf.function(input_signature=[tf.TensorSpec((1, None), tf.int64), tf.TensorSpec((), tf.int32)])
    def _forward(self, tokens: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
        """Logits (1, V) after the last of the tokens (1, T)."""
        embedding, *blocks, head = self._layers
        x = embedding(tokens, position=position)
        for block, cache in zip(blocks, self._caches, strict=True):
            x = block(x, cache=cache, position=position)
        return head(x[:, -1])


def dense(fan_out: int, name: str, deviation: float = DEVIATION, bias: bool = True) -> keras.layers.Dense:
    """A linear layer with normally distributed weights and biases of 0."""
    return keras.layers.Dense(fan_out, use_bias=bias, kernel_initializer=normal(deviation), name=name)


def normal(deviation: float) -> keras.Initializer:
    """An initializer of normally distributed weights with mean 0."""
    return keras.initializers.RandomNormal(stddev=deviation)


def residual_deviation(num_layers: int) -> float:
    """Standard deviation of initial weights before residual connections: smaller in a model with more layers."""
    return DEVIATION / (2 * num_layers) ** 0.5


def dense_gradient(weights: keras.Variable) -> tf.Tensor:
    """The weights; their gradient is a dense tensor instead of the tf.IndexedSlices of tf.gather. Costs nothing."""
    return tf.reshape(weights, weights.shape)
