"""Compression methods, one module each; `compression=<method>` uses the class Compressor of the module."""
