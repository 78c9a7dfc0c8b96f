"""Data-parallel training for PyTorch loops of your own (docs/your-own-script.md)."""
