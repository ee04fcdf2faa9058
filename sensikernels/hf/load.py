"""Models and tokenizers by name or path."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensikernels._core.checks import require_one_of
from sensikernels._core.errors import DataError
from sensikernels.hf.model_folder import CONFIG, check_folder, check_loaded

HEADS = {
    "sequences": "AutoModelForSequenceClassification",
    "tokens": "AutoModelForTokenClassification",
    "answers": "AutoModelForQuestionAnswering",
}
"""The head of a model, by what it labels, and transformers' class for it."""


def load_model(
    path: Path | str,
    *,
    labels: int,
    dtype: torch.dtype = torch.float32,
    trust_remote_code: bool = False,
    head: str = "sequences",
    problem: str | None = None,
) -> nn.Module:
    """A model with a head of ``HEADS``: a hub name, or a folder with ``config.json``.

    ``head`` labels ``sequences`` (``labels=1`` is regression), ``tokens``, or the first and last
    token of ``answers``; ``problem`` is HuggingFace's ``problem_type``, as for several labels a
    sequence. A head for other labels is not loaded but made anew; every other weight comes from the
    folder. Code of the folder runs only with ``trust_remote_code``.

    Raises:
        DataError: the model cannot be loaded, naming the file and what is wrong with it: a config
            that cannot be, weights missing, left over, of another size, not finite or damaged.
    """
    import transformers

    import sensikernels.hf.families  # noqa: F401  registers the compact classes

    require_one_of(head, "head", HEADS)
    if problem is None and head == "sequences" and labels == 1:
        problem = "regression"
    if (folder := Path(path)).is_dir():
        check_folder(folder)
    model, found = _load(
        getattr(transformers, HEADS[head]),
        path,
        num_labels=labels,
        dtype=dtype,
        ignore_mismatched_sizes=True,
        output_loading_info=True,
        trust_remote_code=trust_remote_code,
        **({} if problem is None else {"problem_type": problem}),
    )
    check_loaded(path, model, found)
    trained: nn.Module = model
    return trained


def load_tokenizer(
    path: Path | str, *, trust_remote_code: bool = False, words: bool = False
) -> Any:
    """The tokenizer of a model: a hub name, or a folder with its vocabulary.

    ``words``: it will be given single words; one that tells words by the blank before them then
    puts one before the first, too.

    Raises:
        DataError: it cannot be loaded, or the folder holds no vocabulary: an empty one is made up
            by the library then, which knows no word.
    """
    from transformers import AutoTokenizer

    made = _load(AutoTokenizer, path, trust_remote_code=trust_remote_code)
    if words and getattr(made, "add_prefix_space", None) is False:
        made = _load(
            AutoTokenizer, path, trust_remote_code=trust_remote_code, add_prefix_space=True
        )
    names = sorted(set(made.vocab_files_names.values()))
    folder = Path(path)
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        raise DataError(f"model {path}: no tokenizer: none of {', '.join(names)} there")
    if len(made) <= len(set(made.all_special_ids)):
        raise DataError(f"model {path}: tokenizer without a word: {', '.join(names)} expected")
    return made


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
    """``auto.from_pretrained``; any error it raises becomes a DataError about its files."""
    try:
        return auto.from_pretrained(str(path), **named)
    except Exception as error:
        raise DataError(f"model {path}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a library's error, with its class unless it is a message to users."""
    lines = str(error).strip().splitlines() or [""]
    plain = isinstance(error, (OSError, ValueError))
    return lines[0] if plain else f"{CONFIG} or weights: {type(error).__name__}: {lines[0]}"


def random_model(model_type: str, *, labels: int = 2, **shape: Any) -> nn.Module:
    """A sequence classifier with random weights, of the type's own config with ``**shape``."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(model_type, num_labels=labels, **shape)
    model: nn.Module = AutoModelForSequenceClassification.from_config(config)
    return model
