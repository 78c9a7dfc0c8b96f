"""The places of ranks in a job, and how ranks agree. With Keras 3 on TensorFlow."""
