"""Parts of a run beside its steps: checkpoints, evaluation, generation. With PyTorch."""
