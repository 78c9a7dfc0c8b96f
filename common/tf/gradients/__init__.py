"""The gradient exchange: buckets, compressors, the loss scale. With Keras 3 on TensorFlow."""
