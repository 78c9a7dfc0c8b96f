"""Tests of recipes and commands as a user starts them."""
