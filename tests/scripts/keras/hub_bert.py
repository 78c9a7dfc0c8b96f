"""A BERT classifier of KerasHub from a configuration, with its own optimizer and loss."""

from horovod_recipes import fit  # new

import keras
import keras_hub
import numpy as np

fit.init(seed=1)  # was: keras.utils.set_random_seed(1)

random = np.random.default_rng(1)
sizes = {"num_layers": 2, "num_heads": 2, "hidden_dim": 16, "intermediate_dim": 32, "max_sequence_length": 12}
backbone = keras_hub.models.BertBackbone(vocabulary_size=40, **sizes)
model = keras_hub.models.BertTextClassifier(backbone, num_classes=2, preprocessor=None)
lengths = random.integers(4, 13, size=(45, 1))
x = {
    "token_ids": random.integers(1, 40, size=(45, 12)),
    "segment_ids": np.zeros((45, 12), "int64"),
    "padding_mask": np.arange(12) < lengths,
}
y = random.integers(2, size=45)
model.compile(optimizer=keras.optimizers.SGD(0.1), loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
fit.distribute(model)  # new
history = model.fit(x, y, batch_size=8, epochs=3, verbose=0)
outcome = {**history.history, "weights": model.get_weights()}
