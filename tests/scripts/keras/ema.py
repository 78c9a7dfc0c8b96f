"""An optimizer that keeps averages of the weights, with which the model is evaluated; a frozen layer."""

from horovod_recipes import fit  # new

import keras
import numpy as np

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
x, y = random.normal(size=(90, 8)).astype("float32"), random.integers(3, size=90)
frozen = keras.layers.Dense(16, "gelu", trainable=False)
model = keras.Sequential([keras.Input((8,)), frozen, keras.layers.Dense(16, "gelu"), keras.layers.Dense(3)])
model.compile(
    keras.optimizers.Adam(1e-2, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=None),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
fit.distribute(model)  # new
swap = keras.callbacks.SwapEMAWeights(swap_on_epoch=True)
history = model.fit(x, y, batch_size=20, epochs=3, validation_data=(x[:30], y[:30]), callbacks=[swap], verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
