"""Functions that switch packed tokens on and off, and that say how a model is packed."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn
from transformers import PreTrainedModel

from sensikernels._core.checks import expected, require
from sensikernels._core.hooks import hooked
from sensikernels._core.shapes import token_multiple
from sensikernels.hf.families import FAMILIES
from sensikernels.hf.family import Family, PackedStep, reach, stock_class
from sensikernels.hf.module_state import Changed, change_back, change_class
from sensikernels.hf.packed.answers import AnswerHead
from sensikernels.hf.packed.encoder import PackedEncoder, Packing, below
from sensikernels.hf.packed.labelled import restore_labelled, use_labelled
from sensikernels.hf.packed.prefix_cache import FrozenPrefixCache, frozen_depth
from sensikernels.hf.packed.tokens import unpadded


def use_packed(
    model: nn.Module,
    *,
    cls_only: bool = True,
    fused: bool = True,
    multiple: int | None = None,
    labelled_only: bool = False,
) -> tuple[str, ...]:
    """Run ``model``'s encoder on packed tokens, in place; one line per change.

    The model takes its padded inputs as before, and packed ones (``PackedEncoder.forward``).

    ``cls_only``: a sequence classifier's last layer runs on first tokens alone (other heads read
    every token and are not changed). ``fused``: one product for query, key and value where that
    gains, and one pass each for embeddings, bias and GELU, dropout, residual and LayerNorm;
    their dropout is counter dropout. Without it the modules are called one by one. Attention's
    dropout is always from a counter. ``multiple``: padded inputs give token counts rounded up to
    multiples of it; default 32, for a model on CUDA 64.
    ``labelled_only``: in training a masked-language model's head and loss run on labelled tokens
    alone. Loss and gradients stay; ``logits`` become ``[labelled, vocabulary]``, so it is off
    unless asked for.

    A question-answering model's softmax leaves padding out, which HuggingFace's counts as places
    where answers may lie: a row's loss is its own, and HuggingFace's where no row is padded.

    Raises:
        UsageError: packed already, no encoder of a family that can, a decoder, relative
            positions, an attention that is not known, or ``labelled_only`` without the family's
            masked-language model.
    """
    family, step, encoder, owner = _packable(model)
    multiple = token_multiple(encoder.device.type) if multiple is None else multiple
    require(multiple >= 1, "multiple", "at least 1", multiple)
    language = step.language
    if labelled_only and (language is None or not isinstance(owner, language.model)):
        wanted = "a masked-language model" if language is None else f"a {language.model.__name__}"
        raise expected("labelled_only", wanted, type(owner).__name__)
    pooled = isinstance(owner, step.first_token)
    average = pooled and step.averages is not None and step.averages(encoder.config)
    first_read = pooled and not average
    cls_only = cls_only and first_read
    answers = isinstance(owner, step.answers)
    packing = Packing(
        family=family,
        cls_only=cls_only,
        fused=fused,
        multiple=multiple,
        repad=answers,
        first_read=first_read,
        average=average,
        labelled_only=labelled_only,
    )
    change_class(encoder, PackedEncoder)
    encoder.packing = packing
    if answers:
        change_class(owner, AnswerHead)
    if labelled_only:
        use_labelled(owner, family, multiple)
    return _report(packing)


def _report(packing: Packing) -> tuple[str, ...]:
    """A line for each change."""
    report = ["tokens packed"]
    report += ["fused passes"] if packing.fused else []
    report += ["last layer on first tokens"] if packing.cls_only else []
    report += ["language head on labelled tokens, in training"] if packing.labelled_only else []
    return tuple(report)


def restore_packed(model: nn.Module) -> None:
    """Undo ``use_packed``. Raises UsageError if it is not in use."""
    _, _, encoder, owner = _home(model)
    if not isinstance(encoder, PackedEncoder):
        raise expected("model", "packed tokens", "padded ones")
    restore_labelled(owner)
    if isinstance(owner, AnswerHead):
        change_back(owner)
    change_back(encoder)
    del encoder.packing
    encoder.__dict__.pop("prefix_cache", None)


def cache_frozen_prefix(model: nn.Module, *, limit_mib: float = 1024.0) -> FrozenPrefixCache:
    """Compute the layers below the lowest trained one once for each sentence, and keep the result.

    For a packed model of which the embeddings and at least the lowest layer are frozen, with
    dropout off in them (``p = 0``; it is a change of the model that the caller makes). Undone by
    ``restore_packed``. ``limit_mib``: memory that the kept states may take.

    Raises:
        UsageError: the model is not packed or nothing lowest is frozen; at a step, that something
            below trains or drops out after all.
    """
    family, _, encoder, _ = _home(model)
    if not isinstance(encoder, PackedEncoder):
        raise expected("model", "packed tokens (use_packed)", "padded ones")
    layers = list(reach(encoder, family.layers))
    depth = min(frozen_depth(below(encoder, family), layers), len(layers) - 1)
    require(depth > 0, "model", "frozen embeddings and a frozen lowest layer", "trained ones")
    encoder.prefix_cache = FrozenPrefixCache(depth, limit_mib=limit_mib)
    return encoder.prefix_cache


def packing_of(model: nn.Module) -> Packing | None:
    """The choices that ``model`` is packed with; None if it is not packed."""
    encoder = _packed_encoder(model)
    return None if encoder is None else encoder.packing


def computed(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """``batch`` as ``model`` computes it: a packed model's padded inputs without their padding."""
    packing = packing_of(model)
    if packing is None or "cu_seqlens" in batch:
        return batch
    tokens = unpadded(
        batch["input_ids"],
        batch.get("attention_mask"),
        None,
        None,
        multiple=packing.multiple,
        pooled=False,
    )
    return {"input_ids": tokens.input_ids[None], "cu_seqlens": tokens.cu_seqlens}


@contextmanager
def unpacked(model: nn.Module) -> Iterator[None]:
    """HuggingFace's own forwards inside the block, the head's too, whether packed or not."""
    changed = [(m, type(m).__mro__[1]) for m in model.modules() if isinstance(m, Changed)]
    for module, _ in changed:
        change_back(module)
    try:
        yield
    finally:
        for module, mixin in changed:
            change_class(module, mixin)


def _packed_encoder(model: nn.Module) -> PackedEncoder | None:
    """The packed encoder that ``model`` holds or is."""
    return next((m for m in model.modules() if isinstance(m, PackedEncoder)), None)


class _Home(NamedTuple):
    """An encoder inside a model, and the model with the head it has: itself where it has none."""

    family: Family
    step: PackedStep
    encoder: Any
    owner: nn.Module


def _home(model: nn.Module) -> _Home:
    """The encoder of ``model``, wherever it is wrapped. Raises UsageError: none known, or two."""
    found = [
        (name, module, family)
        for name, module in model.named_modules()
        for family in FAMILIES
        if family.packed is not None and isinstance(module, family.packed.encoder)
    ]
    if not found:
        titles = " or ".join(family.title for family in FAMILIES if family.packed)
        raise expected("model", f"a {titles}", _without_packed_step(model))
    require(len(found) == 1, "model", "one encoder", f"{len(found)} in {type(model).__name__}")
    name, encoder, family = found[0]
    assert family.packed is not None
    owner = model.get_submodule(name.rpartition(".")[0])
    return _Home(family, family.packed, encoder, owner if name else encoder)


def _without_packed_step(model: nn.Module) -> str:
    """The model's class, and why its family runs on padded tokens alone."""
    kind = type(model).__name__
    if isinstance(model, PreTrainedModel):
        config: Any = stock_class(type(model.config))
        named = [f for f in FAMILIES if f.name == config.model_type]
        return f"{kind}, which has {named[0].padded_because}" if named else kind
    return kind


def _packable(model: nn.Module) -> _Home:
    """The encoder of ``model``. Raises UsageError unless packed tokens can run through it."""
    home = _home(model)
    _, step, encoder, _ = home
    require(not isinstance(encoder, PackedEncoder), "model", "padded tokens", "packed ones already")
    config: Any = encoder.config
    decodes = any(getattr(config, flag, False) for flag in ("is_decoder", "add_cross_attention"))
    require(not decodes, "model", "an encoder", "a decoder")
    positions = getattr(config, "position_embedding_type", None) or "absolute"
    require(positions == "absolute", "model", "absolute positions", positions)
    kind: Any = step.encoder
    own = type(encoder).forward is kind.forward
    require(own, "model", f"{kind.__name__}'s own forward", f"that of {type(encoder).__name__}")
    for name, module in encoder.named_modules():
        _check_module(f"model: {name}", module, step.around.get(re.sub(r"\d+", "N", name)))
    return home


def _check_module(name: str, module: nn.Module, kinds: tuple[type, ...] | None) -> None:
    """Raise UsageError for a module that packed tokens cannot run through.

    ``kinds``: the classes that a module may have whose forward is not called.
    """
    if isinstance(module, nn.Embedding) and module.scale_grad_by_freq:
        raise expected(name, "no scale_grad_by_freq, as the tokens that fill up count too", "it")
    if kinds is None:
        return
    if stock_class(type(module)) not in kinds:
        raise expected(name, "HuggingFace's " + kinds[0].__name__, type(module).__name__)
    if hooked(module):
        raise expected(name, "no hooks, as packed tokens do not call it", "hooks")
