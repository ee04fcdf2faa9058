"""The command line: ``sensikernels finetune | plan | doctor | bench | tune``."""

from __future__ import annotations

from sensikernels.cli.app import main

__all__ = ["main"]
