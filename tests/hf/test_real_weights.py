"""Weights that packages ship, where ``--model-packages DIR`` names a folder that they lie in.

``pip install --no-deps --target DIR sapiens==1.0.5 rxnmapper==0.4.3`` makes one: a RoBERTa of
antibodies in fairseq's form, and an ALBERT of chemical reactions, a family that is not known.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sensikernels._core.errors import UsageError
from sensikernels.hf import apply, compact, export, restore, sensitivity
from sensikernels.masks import Budget, plan
from tests.hf.test_encoders import STEP, tensors

transformers = pytest.importorskip("transformers")

AMINO = "ACDEFGHIKLMNPQRSTVWY"
PAD, END, MASK = 1, 2, 24
# The variable heavy chains of trastuzumab and pembrolizumab.
CHAINS = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYC"
    "SRWGGDGFYAMDYWGQGTLVTVSS",
    "QVQLVQSGVEVKKPGASVKVSCKASGYTFTNYYMYWVRQAPGQGLEWMGGINPSNGGTNFNEKFKNRVTLTTDSSTTTAYMELKSLQFDDTAVYYCARRDY"
    "RFDMGFDYWGQGTTVTVSS",
)
NAMES = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "output.LayerNorm",
}


@pytest.fixture
def packages(request: pytest.FixtureRequest) -> Path:
    given = request.config.getoption("--model-packages", default=None)
    if given is None:
        pytest.skip("no real weights: give --model-packages DIR")
    return Path(given)


@pytest.fixture
def antibodies(packages: Path) -> Any:
    """The RoBERTa of heavy chains with its language head."""
    path = packages / "sapiens" / "models" / "v1" / "checkpoint_vh.pt"
    with torch.serialization.safe_globals([argparse.Namespace]):
        held = torch.load(path, weights_only=True, map_location="cpu")
    sizes, theirs = held["args"], held["model"]
    words, positions = (
        theirs[f"decoder.sentence_encoder.embed_{name}.weight"] for name in ("tokens", "positions")
    )
    config = transformers.RobertaConfig(
        vocab_size=len(words),
        hidden_size=sizes.encoder_embed_dim,
        num_hidden_layers=sizes.encoder_layers,
        num_attention_heads=sizes.encoder_attention_heads,
        intermediate_size=sizes.encoder_ffn_embed_dim,
        max_position_embeddings=len(positions),
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        pad_token_id=PAD,
    )
    model = transformers.RobertaForMaskedLM(config).eval()
    model.load_state_dict(converted(theirs, config.hidden_size))
    return model


def converted(theirs: dict[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """fairseq's weights by transformers' names; there are no token types."""
    ours = {"roberta.embeddings.token_type_embeddings.weight": torch.zeros(1, hidden)}
    for name, value in theirs.items():
        inner = name.removeprefix("decoder.").removeprefix("sentence_encoder.")
        for one, other in {
            "embed_tokens": "roberta.embeddings.word_embeddings",
            "embed_positions": "roberta.embeddings.position_embeddings",
            "emb_layer_norm": "roberta.embeddings.LayerNorm",
            "layers.": "roberta.encoder.layer.",
            "lm_head.weight": "lm_head.decoder.weight",
            "lm_head.bias": "lm_head.bias",
            **NAMES,
        }.items():
            inner = inner.replace(one, other)
        ours[inner] = value
    ours["lm_head.decoder.bias"] = ours["lm_head.bias"]
    return ours


def chains() -> dict[str, Tensor]:
    """Both chains, every seventh residue hidden, which is what the labels ask for."""
    rows = [torch.tensor([0, *(4 + AMINO.index(c) for c in s), END]) for s in CHAINS]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask, hidden = (ids != PAD).long(), torch.zeros_like(ids, dtype=torch.bool)
    hidden[:, 4::7] = True
    hidden &= (ids != PAD) & (ids != END)
    labels = ids.masked_fill(~hidden, -100)
    ids = ids.masked_fill(hidden, MASK)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def right(logits: Tensor, labels: Tensor) -> float:
    asked = labels != -100
    return float((logits.argmax(-1) == labels)[asked].float().mean())


def test_a_roberta_of_antibodies_is_trimmed_and_packed_as_stock(
    antibodies: Any, tmp_path: Path
) -> None:
    batch = chains()
    stock = tensors(antibodies, batch)
    assert right(stock["logits"], batch["labels"]) > 0.6  # chance is 0.05: it has been learned
    apply(antibodies, features=STEP)
    fast, there = tensors(antibodies, batch), batch["attention_mask"].bool()
    torch.testing.assert_close(fast["loss"], stock["loss"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(fast["logits"][there], stock["logits"][there], rtol=1e-4, atol=1e-4)
    restore(antibodies)
    made = plan(sensitivity(antibodies, [batch]), Budget(flops=0.9))
    apply(antibodies, made, form="masked")
    masked = tensors(antibodies, batch)["logits"]
    assert right(masked, batch["labels"]) > 0.4  # without training after the trim
    restore(antibodies)
    apply(antibodies, made)
    small = compact(antibodies)
    small.save_pretrained(tmp_path / "compact")
    back = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "compact").eval()
    own = small.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in back.state_dict().items())
    for model in (back, export(small).eval()):
        got = tensors(model, batch)["logits"]
        torch.testing.assert_close(got[there], masked[there], rtol=1e-3, atol=1e-3)


def test_an_albert_of_reactions_is_refused_in_one_line(packages: Path) -> None:
    folder = packages / "rxnmapper" / "models" / "transformers" / "albert_heads_8_uspto_all_1310k"
    model = transformers.AlbertForMaskedLM(
        transformers.AlbertConfig(**json.loads((folder / "config.json").read_text()))
    )
    weights = torch.load(folder / "pytorch_model.bin", weights_only=True, map_location="cpu")
    model.load_state_dict(weights, strict=False)
    before = list(model.state_dict())
    for call in (
        lambda: sensitivity(model, [], "magnitude"),
        lambda: apply(model, features=("packed",)),
    ):
        with pytest.raises(UsageError, match="Albert") as caught:
            call()
        assert "\n" not in str(caught.value)
    assert list(model.state_dict()) == before
