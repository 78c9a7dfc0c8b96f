"""How a model is distributed over ranks: pipelines, parameter servers. With Keras 3 on TensorFlow."""
