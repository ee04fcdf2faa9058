"""Models and tokenizers by name or path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensikernels.errors import DataError


def load_model(path: Path | str, *, labels: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A sequence-classification model: a hub name, or a folder with ``config.json``.

    ``labels=1`` is regression. Raises DataError when it cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    import sensikernels.hf.modeling  # noqa: F401  registers the compact classes

    problem = {"problem_type": "regression"} if labels == 1 else {}
    model: nn.Module = _load(
        AutoModelForSequenceClassification, path, num_labels=labels, dtype=dtype, **problem
    )
    return model


def load_tokenizer(path: Path | str) -> Any:
    """The model's tokenizer. Raises DataError when it cannot be loaded."""
    from transformers import AutoTokenizer

    return _load(AutoTokenizer, path)


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports of transformers inside the block; errors still show."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _load(auto: Any, path: Path | str, **named: Any) -> Any:
    try:
        return auto.from_pretrained(str(path), **named)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"model {path}: {first}") from error
