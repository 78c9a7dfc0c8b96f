"""Parts of a run beside its steps: checkpoints, evaluation, generation. With Keras 3 on TensorFlow."""
