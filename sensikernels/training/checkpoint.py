"""Checkpoints: safetensors and JSON, whole or absent, checked to the bit when read back.

``checkpoint/step-00000500/`` holds ``state.safetensors`` (every tensor), ``state.json`` (the rest,
the settings, and digests of all files) and the method's plan. A new one is written under another
name and renamed; only then the older one goes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from sensikernels.errors import CheckpointError
from sensikernels.masks import Plan
from sensikernels.training.output import CHECKPOINTS, remove, writing

FORMAT = 2
STATE, TENSORS, PLAN = "state.json", "state.safetensors", "plan.json"


def save(
    output: Path, step: int, state: Any, *, settings: Mapping[str, Any], plan: Plan | None
) -> None:
    """Write a checkpoint and drop older ones. Raises SensiError where the disk refuses."""
    target = output / CHECKPOINTS / f"step-{step:08d}"
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
    body["files"] = {p.name: _digest(p) for p in sorted(folder.iterdir())}
    text = json.dumps(body)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "body": text}
    (folder / STATE).write_text(json.dumps(whole) + "\n")


def latest(output: Path) -> Path | None:
    """The newest checkpoint of a run, or None if it has written none."""
    return max((output / CHECKPOINTS).glob("step-*"), default=None)


def load(folder: Path, *, settings: Mapping[str, Any]) -> tuple[Any, Plan | None]:
    """The state and plan that ``save`` wrote.

    Raises:
        CheckpointError: a file is missing, truncated or edited, or the settings are others.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        body = _body(folder)
        for name, digest in body["files"].items():
            if _digest(folder / name) != digest:
                raise CheckpointError(f"checkpoint {folder}: {name} is corrupt (digest differs)")
        _same_settings(folder, body["settings"], settings)
        state = unflatten(body["state"], load_file(folder / TENSORS))
    except OSError as error:
        raise CheckpointError(f"checkpoint {error.filename}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"checkpoint {folder}: {reason}") from error
    has_plan = PLAN in body["files"]
    return state, Plan.load(folder / PLAN) if has_plan else None


@contextmanager
def matching(folder: Path) -> Iterator[None]:
    """Turn what loading into another model or method raises into CheckpointError."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        first = " ".join(str(error).split())[:200]
        raise CheckpointError(f"checkpoint {folder}: does not fit this run: {first}") from error


def _body(folder: Path) -> Any:
    whole = json.loads((folder / STATE).read_text())
    text = whole["body"]
    if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
        raise CheckpointError(f"checkpoint {folder}: {STATE} is corrupt (digest differs)")
    body = json.loads(text)
    if body["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {folder}: expected format {FORMAT}, got {body['format']}"
        )
    return body


def _same_settings(folder: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    plain = json.loads(json.dumps(dict(asked)))
    for name in dict.fromkeys([*saved, *plain]):
        if saved.get(name) != plain.get(name):
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


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return digest.hexdigest()
