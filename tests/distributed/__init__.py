"""Tests of what a rank takes from its host and its launcher."""
