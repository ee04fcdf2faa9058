"""The base class of callbacks for ``transformers.Trainer``."""

from __future__ import annotations

from transformers import TrainerCallback

__all__ = ["TrainerCallback"]
