"""The errors a user can cause. The command line prints them on one line."""

from __future__ import annotations


class SensiError(Exception):
    """Base of every error this package raises on purpose; exit code 1."""

    exit_code = 1


class UsageError(SensiError, ValueError):
    """An argument is wrong; exit code 2."""

    exit_code = 2


class DataError(SensiError):
    """A data file is missing or malformed."""


class CheckpointError(SensiError):
    """A checkpoint or plan on disk is incomplete, corrupt or for another model."""
