"""Datasets, and the sampler that assigns examples to ranks."""
