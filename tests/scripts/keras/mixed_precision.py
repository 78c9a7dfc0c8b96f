"""Mixed float16 with Keras' own loss scale."""

from horovod_recipes import fit  # new

import keras
import numpy as np

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)
keras.mixed_precision.set_global_policy("mixed_float16")

random = np.random.default_rng(1)
x, y = random.normal(size=(120, 8)).astype("float32"), random.integers(3, size=120)
model = keras.Sequential(
    [keras.Input((8,)), keras.layers.Dense(16, "gelu"), keras.layers.Dense(3, dtype="float32", activation="softmax")]
)
model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=40, epochs=3, verbose=0)
keras.mixed_precision.set_global_policy("float32")
outcome = {**history.history, "weights": model.get_weights()}
