"""The rows of a training step's batches: real sentences, windows of articles, random ids."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensikernels._core.errors import DataError
from sensikernels._core.files import read_json
from sensikernels.data import embedded_model_path, encode, load
from sensikernels.data.rows import TokenRow
from sensikernels.hf import load_tokenizer

BATCH = 32
MEGABATCH = 50
"""Batches that ``group_by_length`` sorts together, where the data set has that many."""
_CHARACTERS_A_TOKEN = 10  # more than English has, so that a text is not too short for its window


def sentences(task: str, data_dir: Path | None, count: int) -> list[list[TokenRow]]:
    """``count`` batches of 32 tokenised training rows in random order, as a Trainer draws them."""
    return shuffled([_rows(task, data_dir, count)], BATCH)


def grouped_sentences(
    task: str, data_dir: Path | None, count: int, *, types: bool = True
) -> list[list[TokenRow]]:
    """``count`` of the 50 batches of 32 that ``group_by_length`` makes of 1,600 training rows.

    They are every ``50 / count``-th in the order of their lengths, so short and long sentences
    have their share. ``types``: with token types, for models that have a table of them.
    """
    rows = _rows(task, data_dir, MEGABATCH)
    if not types:
        rows = [row._replace(token_type_ids=None) for row in rows]
    batches = grouped(rows, BATCH)
    return [batches[int((at + 0.5) * len(batches) / count)] for at in range(count)]


def _rows(task: str, data_dir: Path | None, batches: int) -> list[TokenRow]:
    examples = load(task, data_dir=data_dir, split="train", max_samples=BATCH * batches)
    encoded = encode(examples, load_tokenizer(embedded_model_path()))
    return [encoded[i] for i in range(len(encoded))]


def grouped(rows: Sequence[TokenRow], size: int) -> list[list[TokenRow]]:
    """Batches of ``size`` rows as transformers' ``LengthGroupedSampler`` makes them, from seed 0.

    A data set of 200 batches or more has megabatches of 50; so have these rows, however few.
    """
    from transformers.trainer_pt_utils import get_length_grouped_indices

    order = get_length_grouped_indices(
        [len(row.input_ids) for row in rows],
        size,
        mega_batch_mult=MEGABATCH,
        generator=torch.Generator().manual_seed(0),
    )
    return _cut([rows[i] for i in order], size)


def shuffled(batches: Sequence[Sequence[TokenRow]], size: int) -> list[list[TokenRow]]:
    """The rows of all batches in random order, from seed 0, in batches of ``size``."""
    rows = [row for batch in batches for row in batch]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    return _cut([rows[i] for i in order], size)


def _cut(rows: list[TokenRow], size: int) -> list[list[TokenRow]]:
    return [rows[at : at + size] for at in range(0, len(rows), size)]


def full_length(rows: int, length: int, seed: int) -> list[TokenRow]:
    """Random rows without padding."""
    rng = np.random.default_rng(seed)
    return [
        TokenRow(rng.integers(1000, 30000, length, dtype=np.int32), None, int(rng.integers(2)))
        for _ in range(rows)
    ]


def windows(folder: Path, count: int, length: int) -> list[TokenRow]:
    """``count`` windows of question and text of SQuAD's ``train.json``, each of ``length`` tokens.

    The text is the question's paragraph and those after it in the article, cut where the window
    is full. Questions whose article ends earlier, or whose answer lies beyond, are left out. So
    no row has padding, which is as good as it gets for padded batches. A row's label is the pair
    of the first and last token of its answer.

    Raises:
        DataError: the file is missing, is not laid out as SQuAD is, or has too few windows.
    """
    path = folder / "train.json"
    try:
        questions = list(_questions(read_json(path)))
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path}: expected SQuAD 1.1's JSON, got {error!r}") from error
    random.Random(0).shuffle(questions)
    tokenizer = load_tokenizer(embedded_model_path())
    rows: list[TokenRow] = []
    for question, texts, first, last in questions:
        if len(rows) == count:
            break
        text = _enough(texts, _CHARACTERS_A_TOKEN * length)
        made = tokenizer(question, text, truncation="only_second", max_length=length)
        ends: Any = [made.char_to_token(at, sequence_index=1) for at in (first, last)]
        if len(made["input_ids"]) == length and None not in ends:
            ids, types = (np.asarray(made[k], np.int32) for k in ("input_ids", "token_type_ids"))
            rows.append(TokenRow(ids, types, ends))
    if len(rows) < count:
        raise DataError(f"{path}: expected {count} windows of {length} tokens, got {len(rows)}")
    return rows


def _questions(content: Any) -> Iterator[tuple[str, list[str], int, int]]:
    """Each question, the paragraphs from its own on, the first and last character of its answer."""
    for article in content["data"]:
        texts = [paragraph["context"] for paragraph in article["paragraphs"]]
        for place, paragraph in enumerate(article["paragraphs"]):
            for asked in paragraph["qas"]:
                answer = asked["answers"][0]
                first = answer["answer_start"]
                last = first + len(answer["text"]) - 1
                yield asked["question"], texts[place:], first, last


def _enough(texts: Sequence[str], characters: int) -> str:
    """As many of the paragraphs as give that many characters, or all."""
    text = ""
    for one in texts:
        text += f" {one}" if text else one
        if len(text) >= characters:
            break
    return text
