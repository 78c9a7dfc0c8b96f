"""Errors that all ranks raise together."""


class TrainingError(Exception):
    """Training cannot go on; the message says why and what to do."""
