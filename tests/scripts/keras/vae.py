"""A variational autoencoder with a train_step of its own, as in Keras' example."""

from horovod_recipes import fit  # new

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)


class Sampling(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(1337)

    def call(self, inputs):
        mean, log_var = inputs
        epsilon = keras.random.normal(ops.shape(mean), seed=self.seed_generator)
        return mean + ops.exp(0.5 * log_var) * epsilon


class VAE(keras.Model):
    def __init__(self, encoder, decoder):
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.total_loss_tracker = keras.metrics.Mean(name="total_loss")
        self.kl_loss_tracker = keras.metrics.Mean(name="kl_loss")

    @property
    def metrics(self):
        return [self.total_loss_tracker, self.kl_loss_tracker]

    def train_step(self, data):
        with tf.GradientTape() as tape:
            mean, log_var, z = self.encoder(data)
            reconstruction = ops.mean(ops.sum(ops.square(data - self.decoder(z)), axis=1))
            kl_loss = ops.mean(ops.sum(-0.5 * (1 + log_var - ops.square(mean) - ops.exp(log_var)), axis=1))
            total_loss = reconstruction + kl_loss
        self.optimizer.apply_gradients(
            zip(tape.gradient(total_loss, self.trainable_weights), self.trainable_weights, strict=True)
        )
        self.total_loss_tracker.update_state(total_loss)
        self.kl_loss_tracker.update_state(kl_loss)
        return {"loss": self.total_loss_tracker.result(), "kl": self.kl_loss_tracker.result(), "last": reconstruction}


inputs = keras.Input((10,))
hidden = layers.Dense(16, "relu")(inputs)
mean, log_var = layers.Dense(2)(hidden), layers.Dense(2)(hidden)
encoder = keras.Model(inputs, [mean, log_var, Sampling()([mean, log_var])])
decoder = keras.Sequential([keras.Input((2,)), layers.Dense(16, "relu"), layers.Dense(10)])
model = VAE(encoder, decoder)
model.compile(optimizer=keras.optimizers.Adam(1e-2))
fit.distribute(model)  # new
x = np.random.default_rng(1).normal(size=(99, 10)).astype("float32")
history = model.fit(x, epochs=3, batch_size=33, verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
