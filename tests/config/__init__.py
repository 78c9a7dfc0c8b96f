"""Tests of how a configuration is composed and what is refused."""
