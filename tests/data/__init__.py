"""Tests of datasets, their files, and the sampler."""
