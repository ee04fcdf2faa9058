"""The description of a family of encoders: all that the generic code asks about a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Couples:
    """Linears of a layer, by role, that lose the same units: rows of some, columns of others.

    ``attention_flops``: forward FLOPs of attention per token, key position and dimension of a unit.
    """

    kind: str
    rows: tuple[str, ...]
    columns: tuple[str, ...] = ()
    attention_flops: int = 0


_QUERY_KEY, _VALUE = ("query", "key"), ("value",)
_NEURONS = Couples(kind="neurons", rows=("intermediate",), columns=("output",))
SIX_LINEARS: Mapping[str, tuple[Couples, ...]] = {
    "heads": (
        Couples(
            kind="heads",
            rows=(*_QUERY_KEY, *_VALUE),
            columns=("attention_output",),
            attention_flops=4,
        ),
        _NEURONS,
    ),
    "dimensions": (
        Couples(kind="qk", rows=_QUERY_KEY, attention_flops=2),
        Couples(kind="vo", rows=_VALUE, columns=("attention_output",), attention_flops=2),
        _NEURONS,
    ),
}
"""Couplings by granularity, for layers of Q, K, V, attention output and two FFN linears."""


class Closing(NamedTuple):
    """The end of half a layer: ``norm(dropout(dense(x)) + residual)``; ``dropout`` may be None."""

    dense: Any
    dropout: Any
    norm: Any


class Block(NamedTuple):
    """The modules of one layer that packed tokens run through.

    ``attention`` holds ``dropout``, ``scaling`` and ``attention_head_size``; ``projections`` are
    query, key and value. ``around`` are the modules whose forwards are not called.
    """

    attention: Any
    projections: tuple[Any, Any, Any]
    attended: Closing
    intermediate: Any
    activation: Any
    output: Closing
    around: tuple[nn.Module, ...]


class GatedBlock(NamedTuple):
    """The modules of one layer whose norms come first, with rotated positions and a gated FFN.

    ``h + dropout(attended(attention(norm(h))))`` is the new ``h`` of
    ``h + output(inner_dropout(activation(a) * b))``, where a and b are the halves of
    ``intermediate(ffn_norm(h))``. ``projection``: the one linear of query, key and value. Of
    attention: ``head_size``, its ``rate`` of dropout now, its ``scale``, the name of its
    ``rotation`` in ``Tokens.rotations``, and how far away a key is seen: ``window``, None for any.
    """

    norm: Any
    projection: Any
    attended: Any
    dropout: Any
    ffn_norm: Any
    intermediate: Any
    activation: Any
    inner_dropout: Any
    output: Any
    head_size: int
    rate: float
    scale: float
    rotation: str
    window: int | None
    around: tuple[nn.Module, ...]


class Embedding(NamedTuple):
    """The modules that make hidden states of token ids.

    ``tables``: of words, positions and token types; None where there are no positions or types.
    ``around``: modules whose forwards are not called. ``project``: a linear from the width of the
    tables to the hidden width, where they differ.
    """

    tables: tuple[Any, Any, Any]
    norm: Any
    dropout: Any
    around: tuple[nn.Module, ...]
    project: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class LanguageHead:
    """A family's masked-language model; ``logits``: ``[…, hidden]`` to ``[…, vocabulary]``."""

    model: type
    logits: Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedStep:
    """The classes and functions by which an encoder runs on packed tokens.

    ``encoder``: the class of the encoder, whose own forward is replaced.
    ``around``: the modules whose forwards are not called, by their names in the encoder (``N``
    stands for a layer's number), with the classes they may have.
    ``embedding`` and ``block``: the modules of the encoder's embeddings and of one layer.
    ``positions``: from the encoder, ``input_ids`` (``[rows, length]``, or ``[1, tokens]`` with
    ``cu_seqlens``) and ``cu_seqlens`` to position ids of the same shape; None: counted from 0.
    ``rotations``: from the encoder, hidden states and position ids ``[tokens]`` to cos and sin
    ``[tokens, head_dim / 2]`` by name, once a step; None where positions are not rotated.
    ``windowed``: some layers see near keys alone, so no padding may lie between tokens.
    ``closing``: the path in the encoder to a norm after the last layer.
    ``first_token``: heads that read first tokens alone, unless ``averages`` says of their config
    that they average all tokens of a sequence. ``answers``: models of question answering, which
    read the hidden states as ``[rows, length, hidden]``.
    """

    encoder: type[nn.Module]
    around: Mapping[str, tuple[type, ...]]
    embedding: Callable[[Any], Embedding]
    block: Callable[[Any], Block | GatedBlock]
    positions: Callable[[Any, Tensor, Tensor | None], Tensor] | None = None
    rotations: Callable[[Any, Tensor, Tensor], Mapping[str, tuple[Tensor, Tensor]]] | None = None
    windowed: bool = False
    closing: str = ""
    first_token: tuple[type, ...] = ()
    averages: Callable[[Any], bool] | None = None
    answers: tuple[type, ...] = ()
    language: LanguageHead | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Compact:
    """What ``modeling_compact`` makes the classes of trimmed models of.

    ``config``: transformers' config class. ``attention``: its class of attention, where query and
    value can have head sizes of their own. ``counts``: attributes of an attention that count its
    ``heads``, or its rows of query (``qk``) or value (``vo``). ``biased``: every head has a bias
    of its own, which the encoder makes for all heads of an untrimmed layer.
    """

    config: Any
    attention: type | None = None
    counts: Mapping[str, str] = field(default_factory=dict)
    biased: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """One family of encoders as transformers lays it out.

    ``name``: its ``model_type``. ``title``: its name in messages.
    ``attentions``: classes of attention whose arithmetic is known, with the module that defines
    each.
    ``encoder``: the attribute of a model with a head that holds the encoder. ``layers``: the path
    from the encoder to its layers. ``below``: the encoder's modules under the layers.
    ``linears``: the paths from a layer to its linears, by role; those of ``optional`` roles may be
    absent, and run once a batch on a table: their FLOPs are not counted. ``norms``: the paths to
    its norms, ``attention_norm`` and ``output_norm``.
    ``attention``: the path to the module that attends.
    ``couplings``: the linears that lose units together, by granularity. ``repeats``: how many rows
    of each unit's row a linear of that role holds, where query, key and value, or the halves of a
    gated unit, are one linear.
    ``embeddings``, ``pooler``, ``pooler_linear``, ``classifier``, ``heads``: names of modules
    outside the layers; ``heads`` are those of every task, which always train.
    ``config_names``: its names of the sizes in a config, where they are not BERT's.
    ``packed`` and ``compact``: None if the family cannot run on packed tokens, or be compacted;
    ``padded_because``: why it cannot run on packed tokens.
    """

    name: str
    title: str
    attentions: Mapping[str, str]
    encoder: str
    layers: str
    linears: Mapping[str, str]
    norms: Mapping[str, str]
    attention: str
    couplings: Mapping[str, tuple[Couples, ...]]
    below: tuple[str, ...] = ("embeddings",)
    embeddings: str = "embeddings"
    pooler: str = "pooler"
    pooler_linear: str = "pooler.dense"
    classifier: str = "classifier"
    heads: tuple[str, ...] = ("classifier", "qa_outputs")
    config_names: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    repeats: Mapping[str, int] = field(default_factory=dict)
    packed: PackedStep | None = None
    compact: Compact | None = None
    padded_because: str = ""

    def config_name(self, size: str) -> str:
        """The name in a config of ``hidden_size``, ``intermediate_size`` and the like."""
        return self.config_names.get(size, size)

    def knows(self, attention: type) -> bool:
        """Whether ``attention`` is one of ``attentions``, defined where transformers keeps it."""
        stock = stock_class(attention)
        return self.attentions.get(stock.__name__) == stock.__module__

    def units(self) -> dict[str, tuple[str | None, str | None]]:
        """What the rows and the columns of each role's linear are: ``qk``, ``vo``, ``neurons``."""
        sides: dict[str, list[str | None]] = {role: [None, None] for role in self.linears}
        for couples in self.couplings.get("dimensions", self.couplings["heads"]):
            unit = "vo" if couples.kind == "heads" else couples.kind
            for side, roles in enumerate((couples.rows, couples.columns)):
                for role in roles:
                    sides[role][side] = unit
        return {role: (rows, columns) for role, (rows, columns) in sides.items()}

    def parts(self) -> dict[str, Any]:
        """Where its parts are, for ``modeling_compact``: in JSON's types, as configs hold it."""
        return {
            "encoder": self.encoder,
            "layers": self.layers,
            "attention": self.attention,
            "linears": [[self.linears[role], *units] for role, units in self.units().items()],
            "counts": {} if self.compact is None else dict(self.compact.counts),
        }


def stock_class(kind: type) -> type:
    """The class of transformers that a compact one was made of; any other is itself."""
    stock: type = vars(kind).get("stock_class", kind)
    return stock


def reach(module: Any, path: str) -> Any:
    """The submodule at a dotted ``path``; ``module`` itself for an empty one."""
    for name in path.split(".") if path else ():
        module = getattr(module, name)
    return module


def has(module: nn.Module, paths: Sequence[str]) -> bool:
    """Whether ``module`` has a submodule at every path."""
    try:
        for path in paths:
            module.get_submodule(path)
    except AttributeError:
        return False
    return True
