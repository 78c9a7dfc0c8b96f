"""Layers and models of the recipes. With PyTorch."""
