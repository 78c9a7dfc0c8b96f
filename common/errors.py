"""Errors that all ranks raise together."""

from collections.abc import Sequence


class ConfigError(Exception):
    """The user's configuration cannot be run.

    Attributes:
        problems: one message per problem: key=value, the rule, the remedy.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class TrainingError(Exception):
    """Training cannot continue; the message gives the reason and the remedy."""


class Stopped(Exception):  # noqa: N818, as nothing is wrong
    """Training ended early, with a checkpoint, because a rank was asked to stop."""
