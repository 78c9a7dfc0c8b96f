"""Sequences of unknown length with masked steps: an LSTM that labels each step."""

from horovod_recipes import fit  # new

import keras
import numpy as np
from keras import layers

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
lengths = random.integers(2, 9, size=75)
x = np.where(np.arange(9) < lengths[:, None], random.integers(1, 20, size=(75, 9)), 0)
y = (x + np.roll(x, 1, axis=1)) % 3
model = keras.Sequential(
    [
        keras.Input((None,), dtype="int64"),
        layers.Embedding(20, 8, mask_zero=True),
        layers.LSTM(12, return_sequences=True),
        layers.Dense(3),
    ]
)
model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=16, epochs=3, validation_split=0.2, verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
