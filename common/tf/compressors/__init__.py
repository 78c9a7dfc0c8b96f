"""Compression methods, one module each; `compression=<method>` takes the class Compressor of the module."""
