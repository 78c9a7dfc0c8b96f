"""A plain TensorFlow loop with a tape, two metrics, and batch normalisation."""

from horovod_recipes import fit  # new

import keras
import numpy as np
import tensorflow as tf

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
x, y = random.normal(size=(101, 8)).astype("float32"), random.integers(3, size=101)
normalise = keras.layers.BatchNormalization(synchronized=True)
layers = [keras.layers.Dense(16, use_bias=False), normalise, keras.layers.Activation("gelu")]
model = keras.Sequential([keras.Input((8,)), *layers, keras.layers.Dropout(0.2), keras.layers.Dense(3)])
optimizer = keras.optimizers.Adam(1e-2)
loss_fn = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
accuracy = keras.metrics.SparseCategoricalAccuracy()
dataset = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(101, seed=5).batch(20)


def step(inputs, targets):
    with tf.GradientTape() as tape:
        logits = model(inputs, training=True)
        loss = loss_fn(targets, logits)
    optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
    accuracy.update_state(targets, logits)
    return loss


train_step = fit.data_parallel(step, model, optimizer, metrics=[accuracy])  # was: train_step = tf.function(step)
losses, accuracies = [], []
for _ in range(3):
    losses += [float(train_step(inputs, targets)) for inputs, targets in dataset]
    fit.sum_metrics(accuracy)  # new
    accuracies.append(float(accuracy.result()))
    accuracy.reset_state()
outcome = {"losses": losses, "accuracies": accuracies, "weights": model.get_weights()}
