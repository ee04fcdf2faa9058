"""Checks of a model's folder, and of a model loaded from it."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sensikernels._core.errors import DataError
from sensikernels._core.files import (
    digest_of_file,
    one_line,
    read_json,
    sealed,
    unsealed,
    write_json,
)
from sensikernels.hf.families import FAMILIES
from sensikernels.hf.family import Family

CONFIG, DIGESTS = "config.json", "digests.json"
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
WIDTHS = ("heads", "qk_head_size", "vo_head_size", "neurons")
_DIGESTS_FORMAT = 1
_SIZES: Mapping[str, int] = {
    "vocab_size": 1 << 24,
    "hidden_size": 1 << 16,
    "num_hidden_layers": 512,
    "num_attention_heads": 4096,
    "intermediate_size": 1 << 18,
    "max_position_embeddings": 1 << 20,
    "type_vocab_size": 1 << 16,
}
"""Whole numbers of a config, with the largest that is taken for one."""
_SHARES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
_HEADS = (
    *("cls.", "classifier.", "qa_outputs.", "lm_head.", "generator_", "discriminator_"),
    *("vocab_", "pre_classifier.", "lm_predictions.", "sequence_summary.", "pooler."),
    *("head.", "decoder."),
)
"""What a checkpoint may hold beside the encoder: heads of other tasks."""


def check_folder(folder: Path) -> None:
    """Check config, weights' files and, where this package wrote the folder, their digests.

    Raises:
        DataError: naming the file and the field that is wrong.
    """
    config = _object(folder / CONFIG)
    family = _family(config)
    _check_sizes(folder / CONFIG, config, family)
    if family is not None and config["model_type"] == _compact_type(family):
        _check_widths(folder / CONFIG, config, family)
    _check_index(folder)
    files = weight_files(folder)
    if not files:
        raise DataError(f"model {folder}: no weights: none of {', '.join(WEIGHTS)} there")
    _check_amount(folder, config, files, family)
    if (folder / DIGESTS).exists():
        _check_digests(folder)


def _family(config: Mapping[str, Any]) -> Family | None:
    """The family that a config is of, whether stock or compact."""
    kind = config.get("model_type")
    named = (f for f in FAMILIES if kind in (f.name, _compact_type(f)))
    return next(named, None) if isinstance(kind, str) else None


def _compact_type(family: Family) -> str | None:
    return None if family.compact is None else f"sk_{family.name}"


def weight_files(folder: Path) -> list[Path]:
    """The files of the folder that may hold weights."""
    return sorted(p for kind in ("*.safetensors", "*.bin") for p in folder.glob(kind))


def write_digests(folder: Path) -> None:
    """Write the digests of all files of ``folder``, so that damage is found when it is loaded."""
    files = {p.name: digest_of_file(p) for p in sorted(folder.iterdir()) if p.is_file()}
    write_json(folder / DIGESTS, sealed({"format": _DIGESTS_FORMAT, "files": files}))


def check_loaded(path: Path | str, model: Any, found: Mapping[str, Any]) -> None:
    """Check that ``from_pretrained`` made up no weight, except those of a whole new head.

    A masked-language model has no pooler: with a new head it gets one, and that is logged.

    Raises:
        DataError: a weight is missing, unknown, of another size, or not finite.
    """
    encoder = f"{model.base_model_prefix}."
    head = {name for name, _ in model.named_parameters() if not name.startswith(encoder)}
    sizes = {key for key, *_ in found["mismatched_keys"]}
    missing = set(found["missing_keys"])
    pooler = {name for name, _ in model.named_parameters() if ".pooler." in name}
    unexpected = set(found["unexpected_keys"])
    if not pooler:  # a head of tokens has no use for one
        unexpected = {name for name in unexpected if ".pooler." not in f".{name}"}
    if head | pooler <= missing and pooler:
        logging.getLogger("sensikernels").warning("model %s: no pooler: a new one is trained", path)
        missing -= pooler
    for names, what in (
        (sizes - head, "weights of another size than its config says"),
        (missing - head, "weights are missing"),
        (_foreign(unexpected), "weights that its config has no place for"),
    ):
        if names:
            raise DataError(f"model {path}: {what}: {_few(names)}")
    new = (sizes | missing) & head
    for part in sorted({name.partition(".")[0] for name in new}):
        half = {name for name in head - new if name.startswith(f"{part}.")}
        if half and not sizes & head:
            raise DataError(f"model {path}: weights of half a {part} are missing: {_few(new)}")
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise DataError(f"model {path}: weights that are not finite: {name}")


def _foreign(unexpected: Iterable[str]) -> set[str]:
    return {
        name
        for name in unexpected
        if not name.startswith(_HEADS) and ".pooler." not in name
        if not name.endswith("position_ids")
    }


def _object(path: Path) -> dict[str, Any]:
    try:
        content = read_json(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path}: not JSON that can be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected an object, got {type(content).__name__}")
    return content


def _require(ok: bool, path: Path, name: str, expected: object, got: object) -> None:
    if not ok:
        raise DataError(f"{path}: {name}: expected {expected}, got {got!r:.60}")


def _named(family: Family | None, sizes: Iterable[str]) -> list[str]:
    """The names that ``sizes`` have in a config of the family."""
    return [size if family is None else family.config_name(size) for size in sizes]


def _check_sizes(path: Path, config: Mapping[str, Any], family: Family | None) -> None:
    for name, most in zip(_named(family, _SIZES), _SIZES.values(), strict=True):
        if name in config:
            value = config[name]
            least = 0 if name == "type_vocab_size" else 1
            ok = type(value) is int and least <= value <= most
            _require(ok, path, name, f"a whole number from {least} to {most}", value)
    for name in _SHARES:
        value = config.get(name)
        ok = value is None or (type(value) in (int, float) and 0 <= value < 1)
        _require(ok, path, name, "a share of at least 0 and below 1", value)
    for name in ("layer_norm_eps", "initializer_range"):
        value = config.get(name, 1e-12)
        ok = type(value) in (int, float) and math.isfinite(value) and 0 <= value <= 1
        _require(ok, path, name, "a number from 0 to 1", value)
    pad, words = config.get("pad_token_id"), config.get("vocab_size", 1 << 24)
    ok = pad is None or (type(pad) is int and -1 <= pad < words)
    _require(ok, path, "pad_token_id", f"a token below {words}", pad)
    width, count = _named(family, ("hidden_size", "num_attention_heads"))
    hidden, heads = config.get(width), config.get(count)
    if hidden is not None and heads is not None and "embedding_size" not in config:
        even = hidden % heads == 0
        _require(even, path, count, f"a divisor of {width} {hidden}", heads)
    named = "model_type" not in config or isinstance(config["model_type"], str)
    _require(named, path, "model_type", "a name", config.get("model_type"))


def _check_widths(path: Path, config: Mapping[str, Any], family: Family) -> None:
    """Check that every layer has widths, none larger than those of the model it was made of."""
    sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
    needed = _named(family, sizes)
    for name in needed:
        _require(name in config, path, name, "a whole number", None)
    layers, hidden, heads, neurons = (config[name] for name in needed)
    parts = family.parts()
    _require(config.get("parts", parts) == parts, path, "parts", parts, config.get("parts"))
    widths = config.get("widths")
    _require(isinstance(widths, dict), path, "widths", "an object", widths)
    assert isinstance(widths, dict)
    expected = [str(layer) for layer in range(layers)]
    _require(set(widths) == set(expected), path, "widths", f"layers 0 to {layers - 1}", [*widths])
    size = hidden // heads
    limits = dict(zip(WIDTHS, (heads, size, size, neurons), strict=True))
    for layer, width in widths.items():
        where = f"widths of layer {layer}"
        biased = family.compact is not None and family.compact.biased
        names = (*WIDTHS, "kept_heads") if biased else WIDTHS
        ok = isinstance(width, dict) and set(width) == set(names)
        _require(ok, path, where, ", ".join(names), width)
        for name, most in limits.items():
            ok = type(width[name]) is int and 1 <= width[name] <= most
            _require(ok, path, f"{where}: {name}", f"a whole number from 1 to {most}", width[name])
        if biased:
            left = width["kept_heads"]
            ok = isinstance(left, list) and all(type(head) is int for head in left)
            ok = ok and sorted({*left} & {*range(heads)}) == left and len(left) == width["heads"]
            _require(ok, path, f"{where}: kept_heads", f"{width['heads']} of {heads} heads", left)


def _check_index(folder: Path) -> None:
    """Check that every shard lies in the folder itself."""
    for path in folder.glob("*.index.json"):
        named = _object(path).get("weight_map")
        _require(isinstance(named, dict), path, "weight_map", "an object", named)
        assert isinstance(named, dict)
        for name in named.values():
            plain = isinstance(name, str) and Path(name).name == name and name not in (".", "..")
            _require(plain, path, "weight_map", "names of files in this folder", name)
            _require((folder / name).is_file(), path, "weight_map", "files that exist", name)


def _check_amount(
    folder: Path, config: Mapping[str, Any], files: Iterable[Path], family: Family | None
) -> None:
    """Check that the config asks for no more weights than there are bytes, before any are made."""
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")
    words, hidden, layers, neurons = (config.get(name, 0) for name in _named(family, names))
    trimmed = config.get("widths")
    least = words * config.get("embedding_size", hidden)
    if family is not None and config["model_type"] == family.name:
        least += layers * (4 * hidden * hidden + 2 * hidden * neurons)
    elif trimmed:
        rows = (
            w["heads"] * (w["qk_head_size"] + w["vo_head_size"]) + w["neurons"]
            for w in trimmed.values()
        )
        least += 2 * hidden * sum(rows)
    held = sum(path.stat().st_size for path in files)
    if isinstance(least, int) and least > held:
        raise DataError(
            f"{folder / CONFIG}: expected sizes of at most the {held} bytes of weights there, got "
            f"{least} weights: vocab_size {words}, hidden_size {hidden}, {layers} layers"
        )


def _check_digests(folder: Path) -> None:
    path = folder / DIGESTS
    remedy = f"if the folder was changed on purpose, delete {DIGESTS}"
    try:
        files = unsealed(read_json(path), _DIGESTS_FORMAT, remedy).get("files")
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: {one_line(error)}") from error
    _require(isinstance(files, dict), path, "files", "an object", files)
    assert isinstance(files, dict)
    for name, digest in files.items():
        plain = Path(name).name == name and (folder / name).is_file()
        _require(plain, path, "files", "names of files in this folder", name)
        if digest_of_file(folder / name) != digest:
            raise DataError(f"{folder / name}: damaged or changed since it was saved; {remedy}")


def _few(names: Iterable[str]) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 2} more" if len(ordered) > 2 else ""
    return ", ".join(ordered[:2]) + more
