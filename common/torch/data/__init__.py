"""Data loading for user-written training loops. With PyTorch."""
