"""Checkpoints: safetensors and JSON, whole or absent, checked to the bit when read back.

``checkpoint/step-00000500/`` holds ``state.safetensors`` (every tensor), ``state.json`` (the rest,
the settings, and digests of all files) and the method's plan. A new one is written under another
name and renamed; only then the older one goes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sensikernels._core.errors import CheckpointError, SensiError
from sensikernels._core.files import (
    digest_of_file,
    one_line,
    parse_json,
    read_json,
    remove,
    writing,
)
from sensikernels.masks import Plan
from sensikernels.training.output import CHECKPOINTS

FORMAT = 6
STATE, TENSORS, PLAN, GRIDS = "state.json", "state.safetensors", "plan.json", "plan.safetensors"


def save(
    output: Path, step: int, state: Any, *, settings: Mapping[str, Any], plan: Plan | None
) -> None:
    """Write a checkpoint and drop older ones.

    Raises:
        SensiError: the disk refuses, or the state is not finite, so that nobody could go on from
            it: what was written earlier stays.
    """
    target = output / CHECKPOINTS / f"step-{step:08d}"
    if (where := not_finite(state)) is not None:
        older = latest(output)
        kept = "no checkpoint before it" if older is None else f"{older} is kept: --resume"
        raise SensiError(f"step {step}: training diverged: {where} is not finite; {kept}")
    with writing(target) as folder:
        write(folder, step, state, settings=settings, plan=plan)
    for other in target.parent.iterdir():
        if other != target:
            remove(other)


def write(
    folder: Path, step: int, state: Any, *, settings: Mapping[str, Any], plan: Plan | None
) -> None:
    """Make ``folder`` with the state, a tree of tensors and plain values, and the plan in it."""
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    tree = flatten(state, tensors)
    folder.mkdir()
    save_file(_separate(tensors), folder / TENSORS)
    if plan is not None:
        plan.save(folder / PLAN)
    body = {"format": FORMAT, "step": step, "settings": dict(settings), "state": tree}
    body["files"] = {p.name: digest_of_file(p) for p in sorted(folder.iterdir())}
    text = json.dumps(body, allow_nan=False)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
    (folder / STATE).write_text(json.dumps(whole) + "\n")


def latest(output: Path) -> Path | None:
    """The newest checkpoint of a run, or None if it has written none."""
    return max((output / CHECKPOINTS).glob("step-*"), default=None)


def load(folder: Path, *, settings: Mapping[str, Any]) -> tuple[Any, Plan | None]:
    """The state and plan that ``save`` wrote.

    Raises:
        CheckpointError: a file is missing, truncated, edited or not one of a checkpoint, or the
            settings are others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        body = _body(folder)
        if set(body) != {"format", "step", "settings", "state", "files"}:
            raise ValueError(f"{STATE}: expected its five parts, got {str(list(body))[:200]}")
        files, step = body["files"], body["step"]
        named = folder.name.removeprefix("step-")
        if type(step) is not int or step < 0 or (named.isdecimal() and step != int(named)):
            raise ValueError(f"{STATE}: step: expected the folder's, got {step!r:.40}")
        expected = [TENSORS] if PLAN not in files else [PLAN, GRIDS, TENSORS]
        if list(files) != expected:
            raise ValueError(f"files: expected {expected}, got {str(list(files))[:200]}")
        for name, digest in files.items():
            if digest_of_file(folder / name) != digest:
                raise ValueError(f"{name} is corrupt (digest differs)")
        _same_settings(folder, body["settings"], settings)
        state = unflatten(body["state"], load_file(folder / TENSORS))
        if (where := not_finite(state)) is not None:
            raise ValueError(f"{TENSORS}: {where} is not finite")
    except OSError as error:
        raise CheckpointError(f"checkpoint {error.filename}: {error.strerror}") from error
    except _MALFORMED as error:
        reason = f"{STATE}: {type(error).__name__}: {one_line(error)}"
        raise CheckpointError(f"checkpoint {folder}: {reason}") from error
    except (ValueError, SafetensorError) as error:
        raise CheckpointError(f"checkpoint {folder}: {one_line(error)}") from error
    return state, Plan.load(folder / PLAN) if PLAN in files else None


# What taking a stranger's JSON apart raises, where the text alone would not say what was wrong.
_MALFORMED = (KeyError, TypeError, AttributeError, IndexError, RecursionError)


@contextmanager
def matching(folder: Path) -> Iterator[None]:
    """Turn what loading into another model or method raises into CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, AssertionError, OverflowError, *_MALFORMED) as error:
        why = one_line(error)
        raise CheckpointError(f"checkpoint {folder}: does not fit this run: {why}") from error


def not_finite(tree: Any, at: str = "") -> str | None:
    """The place of the first number in a tree of tensors and plain values that is not finite."""
    if isinstance(tree, Tensor):
        finite = not tree.is_floating_point() or bool(tree.isfinite().all())
        return None if finite else at
    if isinstance(tree, float):
        return None if math.isfinite(tree) else at
    if isinstance(tree, Mapping):
        parts = ((str(name), value) for name, value in tree.items())
    elif isinstance(tree, (list, tuple)):
        parts = ((str(place), value) for place, value in enumerate(tree))
    else:
        return None
    found = (not_finite(value, f"{at}.{name}".lstrip(".")) for name, value in parts)
    return next((where for where in found if where is not None), None)


def _body(folder: Path) -> Any:
    whole = read_json(folder / STATE)
    text = whole["body"]
    if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
        raise ValueError(f"{STATE} is corrupt (digest differs)")
    body = parse_json(text)
    if body["format"] != FORMAT:
        raise ValueError(f"{STATE}: expected format {FORMAT}, got {body['format']!r:.40}")
    return body


def _same_settings(folder: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(asked)))
    for name in dict.fromkeys([*saved, *plain]):
        if name not in saved or name not in plain or saved[name] != plain[name]:
            raise CheckpointError(
                f"checkpoint {folder}: {name}: expected {saved.get(name)!r} as in the run to "
                f"resume, got {plain.get(name)!r}"
            )


def flatten(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """``tree`` as JSON values; tensors move into ``tensors``. Raises TypeError on other types."""
    if isinstance(tree, Tensor):
        key = f"{len(tensors):06d}"
        tensors[key] = tree.detach()
        return {"tensor": key}
    if isinstance(tree, Mapping):
        return {"map": [[flatten(k, tensors), flatten(v, tensors)] for k, v in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [flatten(item, tensors) for item in tree]}
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    raise TypeError(f"cannot be put into a checkpoint: {type(tree).__name__}")


def unflatten(tree: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The inverse of ``flatten``."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "map":
        return {unflatten(k, tensors): unflatten(v, tensors) for k, v in content}
    items = [unflatten(item, tensors) for item in content]
    return items if kind == "list" else tuple(items)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, as the file format wants them."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        plain = tensor.cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != plain.numel() * plain.element_size():
            plain = plain.clone()
        seen.add(plain.untyped_storage().data_ptr())
        apart[name] = plain
    return apart
