"""Damaged plans are refused by name; what is accepted is the plan that was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sensikernels as sk
from sensikernels._core.errors import CheckpointError, UsageError
from sensikernels._core.files import digest_of_file, sealed
from sensikernels.masks import Coupling, Mask, Member, Plan
from tests.artefacts.conftest import tiny
from tests.artefacts.damage import cuts, doubled, flips, text_of, values

FLIPS = 60


@pytest.fixture(scope="module")
def made():
    batch = {
        "input_ids": torch.randint(5, 60, (4, 12), generator=torch.Generator().manual_seed(0)),
        "attention_mask": torch.ones(4, 12, dtype=torch.long),
        "labels": torch.tensor([0, 1, 0, 1]),
    }
    return sk.plan(sk.sensitivity(tiny(), [batch]), sk.Budget(flops=0.6))


@pytest.fixture
def saved(made, tmp_path):
    made.save(tmp_path / "plan.json")
    return tmp_path / "plan.json"


def same(one: Plan, other: Plan) -> bool:
    masks = (one.weight_masks.items(), one.update_masks.items())
    others = (other.weight_masks, other.update_masks)
    equal = all(o[n].equal(m) for items, o in zip(masks, others, strict=True) for n, m in items)
    return equal and one.to_json() == other.to_json()


def reseal(path: Path, body: dict) -> None:
    """A forger's file: every digest as it has to be."""
    body = {k: v for k, v in body.items() if k != "digest"}
    path.write_text(json.dumps(sealed(body)))


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_bytes(made, saved, refused, name):
    file = saved.with_name(name)
    whole = file.read_bytes()
    for what, spoiled in [*cuts(whole), *flips(whole, FLIPS)]:
        file.write_bytes(spoiled)
        got = refused(lambda: Plan.load(saved), saved, what)
        assert got is None or same(got, made), what


def test_every_field_edited_by_hand(saved, refused):
    body = json.loads(saved.read_text())
    for what, spoiled in values(body, 4):
        saved.write_bytes(text_of(spoiled))
        got = refused(lambda: Plan.load(saved), saved, what)
        assert got is None or text_of(spoiled) == text_of(body), what
    for what, text in doubled(json.dumps(body)):
        saved.write_text(text)
        assert refused(lambda: Plan.load(saved), saved, what) is None, what


def test_an_edited_count_says_what_to_do(saved):
    body = json.loads(saved.read_text())
    body["kept"] = dict.fromkeys(body["kept"], 1)
    saved.write_text(json.dumps(body))
    with pytest.raises(CheckpointError, match=r"plan\.json: digest: .*edited.*sensikernels plan"):
        Plan.load(saved)


def test_every_field_forged(made, saved, refused):
    """With digests that fit, a value of the wrong kind is still none of a plan."""
    body = json.loads(saved.read_text())
    for what, spoiled in values(body, 8, seed=1):
        try:
            reseal(saved, spoiled)
        except (ValueError, TypeError):  # NaN: no JSON, so no seal either
            saved.write_bytes(text_of(spoiled))
        got = refused(lambda: Plan.load(saved), saved, what)
        free = what.startswith(("('origin'", "('budget'"))  # anything may be told, or asked for
        possible = what.startswith(
            ("('method'", "('sequence", "('flops", "('params", "('couplings")
        )
        assert got is None or same(got, made) or free or possible, what
        if got is not None:
            assert json.loads(json.dumps(got.to_json())) == {
                k: v for k, v in spoiled.items() if k not in ("digest", "grids")
            }, what


@pytest.mark.parametrize(
    "what", ["nan", "twos", "int64", "bool", "shape", "missing", "more", "one"]
)
def test_forged_grids(saved, refused, what):
    grids = load_file(saved.with_suffix(".safetensors"))
    first = next(iter(grids))
    grid = grids[first]
    changed = {
        "nan": torch.full(grid.shape, float("nan")),
        "twos": torch.full_like(grid, 2),
        "int64": grid.long(),
        "bool": grid.bool(),
        "shape": grid.flatten()[:1].reshape(1, 1),
        "missing": None,
        "more": grid.clone(),
        "one": 1 - grid,
    }[what]
    if changed is None:
        del grids[first]
    else:
        grids[f"{first}x" if what == "more" else first] = changed
    save_file(grids, saved.with_suffix(".safetensors"))
    body = json.loads(saved.read_text())
    reseal(saved, {**body, "grids": digest_of_file(saved.with_suffix(".safetensors"))})
    assert refused(lambda: Plan.load(saved), saved, what) is None


@pytest.mark.parametrize(
    "other",
    [
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"intermediate_size": 128},
        {"hidden_size": 64},
        {"intermediate_size": 32, "num_hidden_layers": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["sensi-bert", "bitfit", "freeze", "dps"])
def test_a_plan_of_another_model_is_refused_before_anything(made, other, method):
    model = tiny(**other)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = (
        made
        if method == "sensi-bert"
        else Plan(
            method=method,
            shapes=made.shapes,
            trainable=tuple(name for name, _ in tiny().named_parameters() if "layer.0" in name),
        )
    )
    with pytest.raises(UsageError, match="plan"):
        sk.apply(model, plan)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def coupling() -> Coupling:
    members = (
        Member(module="up", axis=0, shape=(8, 4)),
        Member(module="down", axis=1, shape=(4, 8)),
    )
    return Coupling(
        name="c",
        kind="neurons",
        layer=0,
        units=8,
        unit_size=1,
        members=members,
        linear_flops=16,
        attention_flops=0,
        params=9,
    )


@pytest.mark.parametrize("spoil", ["other units", "none", "blocks", "shape"])
def test_members_of_a_coupling_agree(spoil):
    kept = torch.arange(8) < 4
    masks = {"up": Mask.rows(kept, (8, 4)), "down": Mask.columns(kept, (4, 8))}
    assert Plan(method="m", weight_masks=masks, couplings=(coupling(),)).kept_counts() == {"c": 4}
    masks["down"] = {
        "other units": Mask.columns(~kept, (4, 8)),
        "blocks": Mask.blocks(torch.ones(2, 8).bool(), (2, 1), (4, 8)),
        "shape": Mask.columns(kept, (5, 8)),
    }.get(spoil, masks["down"])
    if spoil == "none":
        del masks["down"]
    with pytest.raises(UsageError, match="plan: c: down: expected"):
        Plan(method="m", weight_masks=masks, couplings=(coupling(),))
