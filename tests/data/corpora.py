"""Made-up files of words and of questions, and a tokenizer that can spell them."""

from __future__ import annotations

import json
import string
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORDS = ["the", "film", "plot", "was", "what", "good"]


def letters_tokenizer() -> Any:
    """BERT's, with ``WORDS`` whole; other ASCII words are spelled, what is not ASCII is unknown."""
    from transformers import BertTokenizerFast

    marks = [c for c in string.punctuation if c not in "[]"]
    letters = string.ascii_lowercase + string.digits
    pieces = [*letters, *(f"##{c}" for c in letters), *marks]
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *pieces]
    return BertTokenizerFast(vocab={w: i for i, w in enumerate(vocabulary)})


def write_conll(path: Path, sentences: Sequence[Sequence[tuple[str, str]]]) -> Path:
    """Words and tags, a tab between them, a line with a tab alone after each sentence."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ["".join(f"{word}\t{tag}\n" for word, tag in row) + "\t\n" for row in sentences]
    path.write_text("".join(lines))
    return path


def question(name: str, text: str, context: str, *answers: str, **more: Any) -> dict[str, Any]:
    """One question of SQuAD's JSON; answers are where they occur first."""
    found = [{"answer_start": context.index(a), "text": a} for a in answers]
    return {"answers": found, "question": text, "id": name, **more}


def squad_json(*paragraphs: tuple[str, list[dict[str, Any]]], version: str = "1.1") -> Any:
    """An article of paragraphs: context and questions."""
    held = [{"context": context, "qas": qas} for context, qas in paragraphs]
    return {"data": [{"title": "t", "paragraphs": held}], "version": version}


def write_squad(path: Path, *paragraphs: Any, version: str = "1.1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(squad_json(*paragraphs, version=version)))
    return path
