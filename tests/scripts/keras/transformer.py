"""A small transformer that classifies texts, with dropout, a schedule of the learning rate and AdamW."""

from horovod_recipes import fit  # new

import keras
import numpy as np
from keras import layers, ops

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)


class TransformerBlock(layers.Layer):
    def __init__(self, width, num_heads, rate=0.1):
        super().__init__()
        self.attention = layers.MultiHeadAttention(num_heads, width // num_heads, dropout=rate, use_bias=False)
        self.feed_forward = keras.Sequential([layers.Dense(2 * width, "gelu"), layers.Dense(width)])
        self.norms = [layers.LayerNormalization(epsilon=1e-6), layers.LayerNormalization(epsilon=1e-6)]
        self.dropout = layers.Dropout(rate)

    def call(self, inputs):
        out = self.norms[0](inputs + self.dropout(self.attention(inputs, inputs)))
        return self.norms[1](out + self.dropout(self.feed_forward(out)))


class Embedding(layers.Layer):
    def __init__(self, length, vocabulary, width):
        super().__init__()
        self.tokens, self.positions = layers.Embedding(vocabulary, width), layers.Embedding(length, width)

    def call(self, words):
        return self.tokens(words) + self.positions(ops.arange(ops.shape(words)[-1]))


random = np.random.default_rng(1)
x, y = random.integers(40, size=(83, 12)), random.integers(2, size=83)
inputs = keras.Input((12,), dtype="int64")
features = layers.GlobalAveragePooling1D()(TransformerBlock(16, 2)(Embedding(12, 40, 16)(inputs)))
model = keras.Model(inputs, layers.Dense(2, "softmax")(layers.Dropout(0.1)(features)))
rate = keras.optimizers.schedules.CosineDecay(1e-2, 20, warmup_target=2e-2, warmup_steps=3)
model.compile(keras.optimizers.AdamW(rate, weight_decay=0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=16, epochs=3, validation_data=(x[:20], y[:20]), verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
