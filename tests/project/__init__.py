"""Tests of the whole: imports, documents, benchmarks."""
