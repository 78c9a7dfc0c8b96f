"""The guide's train_step and test_step that return all metrics by their names."""

from horovod_recipes import fit  # new

import keras
import numpy as np
import tensorflow as tf

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)


class CustomModel(keras.Model):
    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            y_pred = self(x, training=True)
            loss = self.compute_loss(y=y, y_pred=y_pred)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return self._update(y, y_pred, loss)

    def test_step(self, data):
        x, y = data
        y_pred = self(x, training=False)
        return self._update(y, y_pred, self.compute_loss(y=y, y_pred=y_pred))

    def _update(self, y, y_pred, loss):
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss)
            else:
                metric.update_state(y, y_pred)
        return {metric.name: metric.result() for metric in self.metrics}


random = np.random.default_rng(1)
x, y = random.normal(size=(130, 8)).astype("float32"), random.normal(size=(130, 1)).astype("float32")
inputs = keras.Input((8,))
model = CustomModel(inputs, keras.layers.Dense(1)(keras.layers.Dense(8, "tanh")(inputs)))
model.compile("adam", "mse", metrics=["mae"])
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=26, epochs=2, validation_data=(x[:26], y[:26]), verbose=0)
flat = {
    name: [list(one.values()) if isinstance(one, dict) else one for one in of_all]
    for name, of_all in history.history.items()
}
outcome = {**flat, "weights": model.get_weights()}
