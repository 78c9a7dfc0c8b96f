"""Scripts of the kinds that people bring, each with its lines that were changed to train on all ranks."""
