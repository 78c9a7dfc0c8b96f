"""The gradient exchange: buckets, compressors, the loss scale."""
