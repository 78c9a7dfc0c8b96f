"""Layers and models of the recipes. With Keras 3 on TensorFlow."""
