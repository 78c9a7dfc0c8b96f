"""Tests of the transformer's layers and of half precision."""
