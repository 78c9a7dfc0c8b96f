"""A functional model with two inputs and two outputs, fed with dicts, with sample weights."""

from horovod_recipes import fit  # new

import keras
import numpy as np
from keras import layers

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
title = random.integers(50, size=(101, 7))
tags = random.normal(size=(101, 5)).astype("float32")
priority, department = random.random((101, 1)), random.integers(3, size=101)
words = keras.Input((7,), dtype="int64", name="title")
flags = keras.Input((5,), name="tags")
features = layers.concatenate([layers.GlobalAveragePooling1D()(layers.Embedding(50, 8)(words)), flags])
model = keras.Model(
    [words, flags],
    {
        "priority": layers.Dense(1, activation="sigmoid", name="priority")(features),
        "department": layers.Dense(3, name="department")(features),
    },
)
model.compile(
    keras.optimizers.RMSprop(1e-2),
    loss={
        "priority": "binary_crossentropy",
        "department": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    },
    loss_weights={"priority": 1.0, "department": 0.2},
    metrics={"priority": ["mae"], "department": ["accuracy"]},
)
fit.distribute(model)  # new
history = model.fit(
    {"title": title, "tags": tags},
    {"priority": priority, "department": department},
    sample_weight={"priority": random.random(101), "department": random.random(101)},
    batch_size=16,
    epochs=3,
    verbose=0,
)
predicted = model.predict({"title": title, "tags": tags}, verbose=0)
outcome = {**history.history, "predicted": list(predicted.values()), "weights": model.get_weights()}
