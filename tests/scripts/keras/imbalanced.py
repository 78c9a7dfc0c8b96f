"""Classes of very different sizes, with class weights, and metrics of binary classification."""

from horovod_recipes import fit  # new

import keras
import numpy as np

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
y = (random.random((257, 1)) < 0.1).astype("uint8")
x = (random.normal(size=(257, 9)) + y).astype("float32")
model = keras.Sequential(
    [keras.Input((9,)), keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.3), keras.layers.Dense(1, "sigmoid")]
)
metrics = [
    keras.metrics.FalseNegatives(name="fn"),
    keras.metrics.Precision(name="precision"),
    keras.metrics.AUC(name="auc"),
]
model.compile(keras.optimizers.Adam(1e-2), "binary_crossentropy", metrics=metrics)
fit.distribute(model)  # new
history = model.fit(
    x,
    y,
    batch_size=64,
    epochs=4,
    class_weight={0: 1 / (y == 0).sum(), 1: 1 / (y == 1).sum()},
    validation_data=(x[:50], y[:50]),
    callbacks=[
        keras.callbacks.EarlyStopping("val_loss", patience=1),
        keras.callbacks.ReduceLROnPlateau("loss", patience=1),
    ],
    verbose=0,
)
outcome = {**history.history, "weights": model.get_weights()}
