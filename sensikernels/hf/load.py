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

    ``labels=1`` is regression. A head for other labels is not loaded but made anew. Raises
    DataError when the model cannot be loaded.
    """
    from transformers import AutoModelForSequenceClassification

    import sensikernels.hf.modeling  # noqa: F401  registers the compact classes

    problem = {"problem_type": "regression"} if labels == 1 else {}
    model, found = _load(
        AutoModelForSequenceClassification,
        path,
        num_labels=labels,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        **problem,
    )
    # A head for other labels is replaced by a new one; any other mismatch is a broken model.
    wrong = sorted(key for key, *_ in found["mismatched_keys"] if not key.startswith("classifier"))
    if wrong:
        raise DataError(f"model {path}: weights of another size than its config says: {wrong[0]}")
    trained: nn.Module = model
    return trained


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
    from safetensors import SafetensorError

    try:
        return auto.from_pretrained(str(path), **named)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0]
        raise DataError(f"model {path}: {first}") from error


def random_bert(*, labels: int = 2, **shape: Any) -> nn.Module:
    """A randomly initialised BERT of ``BertConfig(**shape)``, BERT-base by default."""
    from transformers import BertConfig, BertForSequenceClassification

    model: nn.Module = BertForSequenceClassification(BertConfig(num_labels=labels, **shape))
    return model
