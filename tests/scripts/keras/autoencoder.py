"""A denoising autoencoder: tf.data with random augmentation, gradient accumulation, clipping, regularisers."""

from horovod_recipes import fit  # new

import keras
import numpy as np
import tensorflow as tf

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

images = np.random.default_rng(1).random((131, 16)).astype("float32")
dataset = tf.data.Dataset.from_tensor_slices(images).shuffle(131, seed=2).batch(20)
dataset = dataset.map(lambda image: (image + tf.random.stateless_normal(tf.shape(image), [1, 2], stddev=0.1), image))
model = keras.Sequential(
    [
        keras.Input((16,)),
        keras.layers.GaussianNoise(0.1),
        keras.layers.Dense(4, "relu", bias_regularizer="l1"),
        keras.layers.Dense(16, "sigmoid", kernel_regularizer="l2"),
    ]
)
model.compile(keras.optimizers.Adam(1e-2, gradient_accumulation_steps=3, global_clipnorm=0.5), loss="mse")
fit.distribute(model)  # new
history = model.fit(dataset, epochs=4, validation_data=dataset, verbose=0)
outcome = {**history.history, "predicted": model.predict(images, verbose=0), "weights": model.get_weights()}
