"""A training that breaks off and is started again, with BackupAndRestore and ModelCheckpoint."""

import os

from horovod_recipes import fit  # new

import keras
import numpy as np

folder = os.environ["SCRIPT_FOLDER"]


class Break(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 2:
            raise InterruptedError


def train(*others):
    fit.init(seed=1)  # was: keras.utils.set_random_seed(1)
    random = np.random.default_rng(1)
    x, y = random.normal(size=(95, 8)).astype("float32"), random.integers(3, size=95)
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "gelu"), keras.layers.Dense(3)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), metrics=["accuracy"])
    fit.distribute(model)  # new
    callbacks = [
        keras.callbacks.BackupAndRestore(f"{folder}/backup"),
        keras.callbacks.ModelCheckpoint(f"{folder}/model.keras"),
        keras.callbacks.CSVLogger(f"{folder}/log.csv", append=True),
        *others,
    ]
    return model, model.fit(x, y, batch_size=30, epochs=4, shuffle=False, callbacks=callbacks, verbose=0)


try:
    train(Break())
except InterruptedError:
    model, history = train()
outcome = {**history.history, "weights": model.get_weights()}
