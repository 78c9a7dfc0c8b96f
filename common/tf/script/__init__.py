"""Data-parallel training for scripts of your own, in Keras and in plain TensorFlow (docs/your-own-script.md)."""
