"""What several tests need: launches of ranks, small models, runs that are compared."""
