"""A subclassed model that has no weights before its first batch, fed by a PyDataset."""

from horovod_recipes import fit  # new

import keras
import numpy as np
from keras import layers

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)


class Batches(keras.utils.PyDataset):
    def __init__(self, x, y, batch_size):
        super().__init__()
        self.x, self.y, self.batch_size = x, y, batch_size

    def __len__(self):
        return -(-len(self.x) // self.batch_size)

    def __getitem__(self, index):
        rows = slice(index * self.batch_size, (index + 1) * self.batch_size)
        return self.x[rows], self.y[rows]


class Net(keras.Model):
    def __init__(self):
        super().__init__()
        self.hidden, self.dropout, self.out = layers.Dense(16, "gelu"), layers.Dropout(0.2), layers.Dense(3)

    def call(self, inputs, training=False):
        return self.out(self.dropout(self.hidden(inputs), training=training))


random = np.random.default_rng(1)
x, y = random.normal(size=(109, 6)).astype("float32"), random.integers(3, size=109)
model = Net()
model.compile(
    keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    metrics=["accuracy", keras.metrics.SparseTopKCategoricalAccuracy(2)],
)
fit.distribute(model)  # new
history = model.fit(Batches(x, y, 27), epochs=3, validation_data=Batches(x[:31], y[:31], 27), verbose=0)
outcome = {**history.history, "score": model.evaluate(Batches(x, y, 50), verbose=0), "weights": model.get_weights()}
