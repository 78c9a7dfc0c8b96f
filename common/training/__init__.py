"""Parts of a run beside its steps: checkpoints, the run log, the command line."""
