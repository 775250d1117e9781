"""Errors for people: what is wrong, where, and what to do; each kind knows its exit code.

Raise one of these for anything a user can cause or mend. The command line prints the sentence
and leaves with the code; a traceback is left to bugs of ours.
"""

from __future__ import annotations


class RefineControlError(Exception):
    """Something a person can mend. The message is one or two sentences: what, where, what to do."""

    exit_code = 2


class InvalidInputError(RefineControlError, ValueError):
    """Refused input or configuration."""

    exit_code = 2


class DamagedError(RefineControlError):
    """A file exists but is not what its manifest or index says."""

    exit_code = 65


class MissingError(RefineControlError):
    """Something that can be had is not there: an extra, weights, a gated repository, a GPU."""

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
