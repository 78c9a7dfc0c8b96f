"""The gradient exchange: buckets, compressors, the loss scale. With PyTorch."""
