"""What went wrong, what to do about it, and the exit code that says whose turn it is."""

from __future__ import annotations


class CorralError(Exception):
    """An error that is shown as one paragraph, never as a traceback: what was got, what was expected, what to do."""

    exit_code = 2


class InputError(CorralError):
    """The user's input: a checkpoint, a recipe, an option, a bundle (exit code 2)."""


class CheckFailed(CorralError):
    """A gate or a check said no (exit code 1)."""

    exit_code = 1


class EnvironmentProblem(CorralError):
    """The environment: a missing package, driver, memory or disk space (exit code 3)."""

    exit_code = 3


class Overloaded(EnvironmentProblem):
    """More is asked at a time than is accepted: the same may work later."""
