"""A convolutional network with batch normalisation, from arrays."""

from horovod_recipes import fit  # new

import keras
import numpy as np
from keras import layers

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
x = random.normal(size=(129, 12, 12, 1)).astype("float32")
y = random.integers(4, size=129)
model = keras.Sequential(
    [
        keras.Input((12, 12, 1)),
        layers.Conv2D(8, 3, use_bias=False),
        layers.BatchNormalization(synchronized=True),
        layers.Activation("relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(8, 3, activation="relu"),
        layers.Flatten(),
        layers.Dropout(0.5),
        layers.Dense(4, activation="softmax"),
    ]
)
model.compile(optimizer="adam", loss="sparse_categorical_crossentropy", metrics=["accuracy"])
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=32, epochs=3, validation_split=0.1, verbose=0)
score = model.evaluate(x, y, verbose=0)
outcome = {**history.history, "score": score, "predicted": model.predict(x, verbose=0), "weights": model.get_weights()}
