"""Tests of checkpoints, the record of a run, and loops of ones own."""
