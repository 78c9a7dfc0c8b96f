"""Tests of common/<framework>/script and of horovod_recipes."""
