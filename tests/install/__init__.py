"""Tests of Horovod's build, and of an installed wheel."""
