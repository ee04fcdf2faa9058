"""The embedded task: made-up remarks about films, labelled by a grammar. Not GLUE.

Written with polarity p in {+, -}; the sentence's polarity is its label, so the truth is exact::

    sentence(p) = [opening ","] body(p) [closing] "."
    body(p)     = claim(p) | claim(p) "and" claim(p) | contrast(p)
    contrast(p) = "although" claim(-p) "," claim(p)         the main clause wins
                | claim(p) "although" claim(-p)             ("even though", "despite the fact that")
                | claim(-p) "but" claim(p)                  what follows "but" wins ("yet")
    claim(p)    = before claim(-p) after                    "nobody thought that …", "the claim
                                                             that … is false"
                | topic link [degree] adjective(p)          "the plot was really gripping"
                | topic link inner [degree] adjective(-p)   "the plot was not gripping"
                | topic verb(p)                             "the plot moved me"
                | topic "did not" verb(-p)                  "the plot did not move me"

A claim takes an inner negation, an outer one, both (double negation) or none, whatever its
polarity; degrees ("very") never change it. So no word alone carries the label: an adjective says
as much as the parity of the negations above it allows, and a contrast holds one claim of each
polarity. Adjectives, verbs, negations and connectives have a long tail, as words do: half of each
list makes a fifth of the draws, so much of what a dev sentence turns on was seen a few times, and
has to be known from before. A classifier on word counts must stay far below the truth; one that
reads structure and knows its words can come near it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, TypeVar

import numpy as np

from sensikernels._core.checks import require, require_one_of
from sensikernels.data.tasks import SPLITS, Split
from sensikernels.data.tsv import Examples

TRAIN_ROWS: Final = 3072
DEV_ROWS: Final = 512

T = TypeVar("T")

_TOPICS: Final = tuple(
    "the film|the plot|the acting|the dialogue|the ending|the opening scene|the music|the camera "
    "work|the lead actress|the villain|the script|the editing|the humour|the pacing|the story|the "
    "whole cast|the second half|the director's touch|the romance|the final twist".split("|")
)
_ADJECTIVES: Final = {
    True: (
        "good great wonderful moving gripping charming clever brilliant delightful superb fresh "
        "funny touching elegant convincing impressive memorable lovely excellent witty tender "
        "vivid graceful inspired absorbing enchanting poignant dazzling masterful sublime riveting "
        "heartfelt inventive exquisite radiant spellbinding nuanced sparkling evocative astute "
        "enjoyable engaging amusing satisfying thrilling stunning thoughtful warm sincere lively "
        "refreshing endearing stirring rousing captivating magical hilarious luminous sumptuous "
        "beguiling incisive understated assured bracing exhilarating irresistible mesmerising "
        "ravishing sharp soulful transcendent uplifting winning zesty effervescent ingenious "
        "resonant scintillating virtuosic wondrous"
    ).split(),
    False: (
        "bad awful terrible boring clumsy dull stale tedious silly weak annoying lifeless shallow "
        "painful messy forgettable dreadful bland poor pointless hollow wooden muddled tiresome "
        "contrived plodding insipid leaden grating vapid trite ponderous turgid maudlin "
        "amateurish soporific mawkish threadbare derivative abysmal ugly confusing irritating "
        "disappointing predictable lazy cheap shoddy sloppy dreary tepid trifling incoherent "
        "exasperating unbearable laughable pretentious overlong listless monotonous cloying "
        "charmless witless anaemic bloated cringeworthy excruciating hackneyed inept insufferable "
        "lacklustre limp mindless overwrought pedestrian perfunctory risible slapdash stilted "
        "stultifying torpid unwatchable"
    ).split(),
}
_VERBS: Final = {
    True: (
        ("moved me", "move me"),
        ("won me over", "win me over"),
        ("made me smile", "make me smile"),
        ("impressed us", "impress us"),
        ("kept us amused", "keep us amused"),
        ("delighted the crowd", "delight the crowd"),
        ("held my attention", "hold my attention"),
        ("stayed with me for days", "stay with me for days"),
        ("lived up to the hype", "live up to the hype"),
        ("swept us away", "sweep us away"),
    ),
    False: (
        ("bored me", "bore me"),
        ("let me down", "let me down"),
        ("made me yawn", "make me yawn"),
        ("annoyed us", "annoy us"),
        ("put us to sleep", "put us to sleep"),
        ("disappointed the crowd", "disappoint the crowd"),
        ("tried my patience", "try my patience"),
        ("left me cold", "leave me cold"),
        ("fell flat", "fall flat"),
        ("wore us out", "wear us out"),
    ),
}
_LINKS: Final = ("was", "seemed", "felt", "turned out to be")
_INNER: Final = {
    "was": (
        "was not",
        "was never",
        "was hardly",
        "was anything but",
        "was by no means",
        "was far from",
        "was nowhere near",
    ),
    "seemed": (
        "did not seem",
        "never seemed",
        "hardly seemed",
        "seemed anything but",
        "failed to seem",
    ),
    "felt": ("did not feel", "never felt", "hardly felt", "felt anything but", "felt far from"),
    "turned out to be": (
        "turned out not to be",
        "did not turn out to be",
        "turned out to be anything but",
        "could not turn out to be",
    ),
}
# What stands before the claim it denies, and what after.
_OUTER: Final = (
    ("nobody thought that", ""),
    ("i do not believe that", ""),
    ("it is simply not true that", ""),
    ("no one could say that", ""),
    ("i doubt that", ""),
    ("the claim that", "is false"),
    ("far be it from me to say that", ""),
    ("the critics were wrong to write that", ""),
    ("to say that", "would be a lie"),
    ("you will not hear me say that", ""),
    ("only a fool would think that", ""),
    ("the rumour that", "turned out to be unfounded"),
)
_DEGREES: Final = ("", "", "very ", "really ", "truly ", "so ")
_CONCESSIONS: Final = (
    "although",
    "even though",
    "despite the fact that",
    "while",
    "whereas",
    "notwithstanding that",
    "for all that",
    "granted that",
)
_TURNS: Final = ("but", "yet", "and yet", "still", "nevertheless")
_OPENINGS: Final = (
    "to be honest",
    "after all the talk about it",
    "on a rainy sunday evening",
    "having read the book twice as a child",
    "as far as i can tell",
    "for once",
    "when we saw it with two old friends in a small cinema last winter",
)
_CLOSINGS: Final = (
    "from start to finish",
    "this time",
    "if you ask me",
    "in my humble opinion",
    "and that is all i will say about it",
    "on the big screen at the festival in front of a full house",
)


def generate(split: Split, *, rows: int | None = None, seed: int = 0) -> Examples:
    """Rows of one split: distinct lower-case sentences, classes exactly balanced.

    ``seed`` makes the data, not a subsample of it; 0 is the embedded task. Train and dev share
    no sentence: dev is drawn first, then train, from one stream, so fewer ``rows`` are a prefix
    of more. ``rows`` must be even; the defaults are ``TRAIN_ROWS`` and ``DEV_ROWS``.
    """
    require_one_of(split, "split", SPLITS)
    wanted = rows if rows is not None else (TRAIN_ROWS if split == "train" else DEV_ROWS)
    require(wanted >= 2 and wanted % 2 == 0, "rows", "an even number, at least 2", wanted)
    require(split == "train" or wanted <= DEV_ROWS, "rows", f"at most {DEV_ROWS} for dev", wanted)
    rng = random.Random(seed)
    seen: set[str] = set()
    dev = _distinct(rng, DEV_ROWS if split == "train" else wanted, seen)
    texts, labels = _distinct(rng, wanted, seen) if split == "train" else dev
    return Examples(texts_a=texts, texts_b=None, labels=np.asarray(labels, dtype=np.int64))


def _distinct(rng: random.Random, rows: int, seen: set[str]) -> tuple[list[str], list[int]]:
    texts: list[str] = []
    labels: list[int] = []
    while len(texts) < rows:
        # Rows come in pairs, one of each class in random order.
        first = _chance(rng, 0.5)
        for positive in (first, not first):
            text = _sentence(rng, positive)
            while text in seen:
                text = _sentence(rng, positive)
            seen.add(text)
            texts.append(text)
            labels.append(int(positive))
    return texts, labels


def _sentence(rng: random.Random, positive: bool) -> str:
    text = _body(rng, positive)
    if _chance(rng, 0.22):
        text = f"{_pick(rng, _OPENINGS)} , {text}"
    if _chance(rng, 0.22):
        text = f"{text} {_pick(rng, _CLOSINGS)}"
    return f"{text} ."


def _body(rng: random.Random, positive: bool) -> str:
    form = rng.random()
    if form < 0.45:
        return _claim(rng, positive)
    if form < 0.60:
        return f"{_claim(rng, positive)} and {_claim(rng, positive)}"
    main, other = _claim(rng, positive), _claim(rng, not positive)
    if form < 0.74:
        return f"{_rare(rng, _CONCESSIONS)} {other} , {main}"
    if form < 0.88:
        return f"{main} {_rare(rng, _CONCESSIONS)} {other}"
    return f"{other} , {_rare(rng, _TURNS)} {main}"


def _claim(rng: random.Random, positive: bool) -> str:
    outer, inner = _chance(rng, 0.18), _chance(rng, 0.28)
    polarity = positive ^ outer ^ inner
    topic = _pick(rng, _TOPICS)
    if _chance(rng, 0.3):
        past, base = _rare(rng, _VERBS[polarity])
        text = f"{topic} did not {base}" if inner else f"{topic} {past}"
    else:
        link = _pick(rng, _LINKS)
        if inner:
            link = _rare(rng, _INNER[link])
        text = f"{topic} {link} {_pick(rng, _DEGREES)}{_rare(rng, _ADJECTIVES[polarity])}"
    if outer:
        before, after = _rare(rng, _OUTER)
        text = f"{before} {text} {after}".rstrip()
    return text


# Only Random.random() is promised to give the same stream in every Python version.
def _pick(rng: random.Random, among: Sequence[T]) -> T:
    return among[int(rng.random() * len(among))]


def _rare(rng: random.Random, among: Sequence[T]) -> T:
    """The later in its list, the rarer: the first half of a list makes four draws of five."""
    share = rng.random()
    return among[int(share * share * share * len(among))]


def _chance(rng: random.Random, share: float) -> bool:
    return rng.random() < share
