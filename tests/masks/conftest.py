"""A small structure with two kinds of units."""

from __future__ import annotations

import torch

from sensikernels.masks import Coupling, Member, Scores, Structure

WIDTH, HEAD = 16, 4


def make_structure(layers: int = 2, heads: int = 3, neurons: int = 8) -> Structure:
    couplings: list[Coupling] = []
    for layer in range(layers):
        rows = tuple(
            Member(module=f"{layer}.{part}", axis=0, shape=(heads * HEAD, WIDTH)) for part in "qkv"
        )
        columns = Member(module=f"{layer}.o", axis=1, shape=(WIDTH, heads * HEAD))
        couplings.append(
            Coupling(
                name=f"layer.{layer}.heads",
                kind="heads",
                layer=layer,
                units=heads,
                unit_size=HEAD,
                members=(*rows, columns),
                linear_flops=8 * WIDTH * HEAD,
                attention_flops=4 * HEAD,
                params=HEAD * (4 * WIDTH + 3),
            )
        )
        members = (
            Member(module=f"{layer}.up", axis=0, shape=(neurons, WIDTH)),
            Member(module=f"{layer}.down", axis=1, shape=(WIDTH, neurons)),
        )
        couplings.append(
            Coupling(
                name=f"layer.{layer}.neurons",
                kind="neurons",
                layer=layer,
                units=neurons,
                unit_size=1,
                members=members,
                linear_flops=4 * WIDTH,
                attention_flops=0,
                params=2 * WIDTH + 1,
            )
        )
    return Structure(
        couplings=tuple(couplings), fixed_token_flops=0, fixed_sequence_flops=64, fixed_params=100
    )


def make_scores(structure: Structure, seed: int = 0) -> Scores:
    generator = torch.Generator().manual_seed(seed)
    values = {c.name: torch.rand(c.units, generator=generator) for c in structure.couplings}
    return Scores(
        structure=structure, values=values, criterion="test", statistic="test", sequence_length=10.0
    )
