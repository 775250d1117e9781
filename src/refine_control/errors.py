"""Errors that a user can correct: what is wrong, where, and what to do; each class has an exit code.

The command line prints the message and ends with the code. A traceback always means a bug. Launchers such as torchrun
have exit codes of their own: they end with 1 whatever the code of their processes.
"""

from __future__ import annotations


class RefineControlError(Exception):
    """An error that a user can correct. The message is one or two sentences: what, where, what to do."""

    exit_code = 2


class InvalidInputError(RefineControlError, ValueError):
    """Refused input or configuration."""


class DamagedError(RefineControlError):
    """A file exists but is not what its manifest or index says."""

    exit_code = 65


class MissingError(RefineControlError):
    """Something that can be obtained is missing: an extra, weights, a gated repository, a GPU."""

    exit_code = 69


class NonFiniteError(RefineControlError):
    """Training produced a value that is not finite."""

    exit_code = 70


class WorkerDiedError(RefineControlError):
    """A worker process or a rank died."""

    exit_code = 71


class InUseError(RefineControlError):
    """Another process writes to this folder."""

    exit_code = 73


class StorageError(RefineControlError):
    """The disk is full or cannot be written."""

    exit_code = 74


class InterruptedCleanlyError(RefineControlError):
    """Stopped by a signal after everything was saved."""

    exit_code = 75
