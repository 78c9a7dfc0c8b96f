"""Tests of gradients on ranks: the bindings, compressors, buckets."""
