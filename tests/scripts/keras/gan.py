"""A GAN with two optimizers that compile() takes, and noise on the labels."""

from horovod_recipes import fit  # new

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)


class GAN(keras.Model):
    def __init__(self, discriminator, generator, latent_dim):
        super().__init__()
        self.discriminator, self.generator, self.latent_dim = discriminator, generator, latent_dim
        self.seed_generator = keras.random.SeedGenerator(1337)

    def compile(self, d_optimizer, g_optimizer, loss_fn):
        super().compile()
        self.d_optimizer, self.g_optimizer, self.loss_fn = d_optimizer, g_optimizer, loss_fn
        self.d_loss_metric = keras.metrics.Mean(name="d_loss")
        self.g_loss_metric = keras.metrics.Mean(name="g_loss")

    @property
    def metrics(self):
        return [self.d_loss_metric, self.g_loss_metric]

    def train_step(self, real):
        batch_size = ops.shape(real)[0]
        latent = keras.random.normal((batch_size, self.latent_dim), seed=self.seed_generator)
        combined = ops.concatenate([self.generator(latent), real], axis=0)
        labels = ops.concatenate([ops.ones((batch_size, 1)), ops.zeros((batch_size, 1))], axis=0)
        labels += 0.05 * keras.random.uniform(ops.shape(labels), seed=self.seed_generator)
        with tf.GradientTape() as tape:
            d_loss = self.loss_fn(labels, self.discriminator(combined))
        weights = self.discriminator.trainable_weights
        self.d_optimizer.apply_gradients(zip(tape.gradient(d_loss, weights), weights, strict=True))
        latent = keras.random.normal((batch_size, self.latent_dim), seed=self.seed_generator)
        with tf.GradientTape() as tape:
            g_loss = self.loss_fn(ops.zeros((batch_size, 1)), self.discriminator(self.generator(latent)))
        weights = self.generator.trainable_weights
        self.g_optimizer.apply_gradients(zip(tape.gradient(g_loss, weights), weights, strict=True))
        self.d_loss_metric.update_state(d_loss)
        self.g_loss_metric.update_state(g_loss)
        return {"d_loss": self.d_loss_metric.result(), "g_loss": self.g_loss_metric.result()}


discriminator = keras.Sequential([keras.Input((6,)), layers.Dense(16), layers.LeakyReLU(0.2), layers.Dense(1)])
generator = keras.Sequential([keras.Input((4,)), layers.Dense(16), layers.LeakyReLU(0.2), layers.Dense(6)])
model = GAN(discriminator, generator, latent_dim=4)
model.compile(
    d_optimizer=keras.optimizers.Adam(3e-3),
    g_optimizer=keras.optimizers.Adam(3e-3),
    loss_fn=keras.losses.BinaryCrossentropy(from_logits=True),
)
fit.distribute(model)  # new
real = np.random.default_rng(1).normal(2.0, size=(97, 6)).astype("float32")
history = model.fit(tf.data.Dataset.from_tensor_slices(real).shuffle(97, seed=3).batch(24), epochs=3, verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
