"""The guide's train_step with a loss and metrics of its own."""

from horovod_recipes import fit  # new

import keras
import numpy as np
import tensorflow as tf

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)


class CustomModel(keras.Model):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.loss_tracker = keras.metrics.Mean(name="loss")
        self.mae_metric = keras.metrics.MeanAbsoluteError(name="mae")

    @property
    def metrics(self):
        return [self.loss_tracker, self.mae_metric]

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = keras.ops.mean(keras.losses.mean_squared_error(y, y_pred))
        self.optimizer.apply(tape.gradient(loss, self.trainable_weights), self.trainable_weights)
        self.loss_tracker.update_state(loss)
        self.mae_metric.update_state(y, y_pred)
        return {"loss": self.loss_tracker.result(), "mae": self.mae_metric.result()}


random = np.random.default_rng(1)
x, y = random.normal(size=(129, 8)).astype("float32"), random.normal(size=(129, 1)).astype("float32")
inputs = keras.Input((8,))
model = CustomModel(inputs, keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(inputs)))
model.compile(optimizer=keras.optimizers.Adam(1e-2))
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=32, epochs=3, verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
