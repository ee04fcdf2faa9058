"""Damaged model folders, ours and strangers', are refused by file and field."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import sensikernels as sk
from sensikernels._core.errors import DataError
from sensikernels.hf import load_model, load_tokenizer, quiet, structure_of
from sensikernels.hf.model_folder import write_digests
from sensikernels.masks import uniform
from tests.artefacts.conftest import tiny
from tests.artefacts.damage import BAD, cuts, doubled, flips, text_of, values
from tests.training.tiny import save_tiny

IDS = torch.arange(5, 17).reshape(1, 12)


@pytest.fixture(scope="module", autouse=True)
def silence():
    with quiet():
        yield


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
    """A folder as ``save_pretrained`` writes it."""
    folder = tmp_path_factory.mktemp("stranger") / "model"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compacted(tmp_path_factory):
    """A compact model without the digests that a run adds."""
    folder = tmp_path_factory.mktemp("compact") / "model"
    model = tiny()
    counts = {"layer.0.heads": 2, "layer.0.neurons": 16, "layer.1.neurons": 32}
    sk.apply(model, uniform(structure_of(model), counts))
    sk.compact(model).save_pretrained(folder)
    return folder


@pytest.fixture(params=["stranger", "compacted"])
def folder(request, tmp_path):
    return shutil.copytree(request.getfixturevalue(request.param), tmp_path / "model")


def load(folder):
    return load_model(folder, labels=2).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def usable(made, reference, what):
    """Accepted: then it computes, and what was damaged changed nothing that it computes."""
    assert torch.equal(logits(made), logits(reference)), what


def test_bytes_of_the_config(folder, refused):
    file, reference = folder / "config.json", load(folder)
    whole = file.read_bytes()
    for what, spoiled in cuts(whole):
        file.write_bytes(spoiled)
        if (made := refused(lambda: load(folder), file, what)) is not None:
            usable(made, reference, what)


def test_bytes_of_the_weights(folder, refused):
    file, reference = folder / "model.safetensors", load(folder)
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    for what, spoiled in [*cuts(whole), *flips(whole, 40, within=header)]:
        file.write_bytes(spoiled)
        if (made := refused(lambda: load(folder), file, what)) is not None:
            usable(made, reference, what)


def test_digests_find_every_flip(folder, refused):
    write_digests(folder)
    load(folder)
    for name in ("config.json", "model.safetensors", "digests.json"):
        whole = (folder / name).read_bytes()
        for what, spoiled in flips(whole, 40):
            (folder / name).write_bytes(spoiled)
            assert refused(lambda: load(folder), folder / name, what) is None, what
        (folder / name).write_bytes(whole)
    load(folder)


# What a config may say otherwise and still be one: the model is another then, as it says.
LEGITIMATE = (
    "hidden_act",
    "layer_norm_eps",
    "position_embedding_type",
    "problem_type",
    "is_decoder",
)


def test_every_field_of_the_config(folder, refused):
    file, reference = folder / "config.json", load(folder)
    body = json.loads(file.read_text())
    for what, spoiled in values(body, 5, seed=3):
        file.write_bytes(text_of(spoiled))
        made = refused(lambda: load(folder), file, what)
        if made is not None and not any(f"'{name}'" in what for name in LEGITIMATE):
            usable(made, reference, what)
    for what, text in doubled(json.dumps(body)):
        file.write_text(text)
        assert refused(lambda: load(folder), file, what) is None, what


SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_that_cannot_be_names_its_field(folder, name):
    file = folder / "config.json"
    body = json.loads(file.read_text())
    for bad in [b for b in BAD if b != 0] + [2**31, 10**12]:
        file.write_bytes(text_of({**body, name: bad}))
        with pytest.raises(DataError) as caught:
            load(folder)
        said = str(caught.value)
        assert str(file) in said, (bad, said)
        assert name in said or bad != bad or bad in (float("inf"), True, "\ud800"), (bad, said)


@pytest.mark.parametrize("name", ["heads", "qk_head_size", "vo_head_size", "neurons"])
def test_widths_that_cannot_be(tmp_path, compacted, name):
    folder = shutil.copytree(compacted, tmp_path / "model")
    file = folder / "config.json"
    body = json.loads(file.read_text())
    for bad in (*BAD, 10**9, 2**40, 65):
        widths = {**body["widths"], "0": {**body["widths"]["0"], name: bad}}
        file.write_bytes(text_of({**body, "widths": widths}))
        with pytest.raises(DataError, match=r"config\.json"):
            load(folder)
    for widths in (
        {},
        {"0": body["widths"]["0"]},
        {**body["widths"], "2": body["widths"]["0"]},
        {"-1": {}, "0": {}},
        [],
        None,
        "0",
    ):
        file.write_bytes(text_of({**body, "widths": widths}))
        with pytest.raises(DataError, match=r"config\.json: widths"):
            load(folder)


def test_parts_that_cannot_be(tmp_path, compacted):
    folder = shutil.copytree(compacted, tmp_path / "model")
    file = folder / "config.json"
    body = json.loads(file.read_text())
    parts = body["parts"]
    for bad in (*BAD, {}, [], {**parts, "layers": "encoder"}, {**parts, "linears": []}):
        file.write_bytes(text_of({**body, "parts": bad}))
        with pytest.raises(DataError, match=r"config\.json"):
            load(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda t: t.pop("bert.pooler.dense.weight"), "missing: bert.pooler.dense.weight"),
        (
            lambda t: t.pop("bert.encoder.layer.0.output.dense.bias"),
            "missing: bert.encoder.layer.0",
        ),
        (lambda t: t.pop("classifier.bias"), "half a classifier"),
        (
            lambda t: t.update({"bert.encoder.layer.2.output.dense.bias": torch.ones(32)}),
            "no place",
        ),
        (lambda t: t.update({"other.weight": torch.ones(2)}), "no place for: other.weight"),
        (lambda t: t["classifier.weight"].fill_(float("nan")), "not finite: classifier.weight"),
        (
            lambda t: t["bert.embeddings.word_embeddings.weight"][3].fill_(float("inf")),
            "not finite",
        ),
        (lambda t: t.update({"bert.pooler.dense.bias": torch.ones(31)}), "another size"),
        (lambda t: t.clear(), "model"),
    ],
    ids=[
        "pooler",
        "encoder",
        "half a head",
        "a layer more",
        "a stranger",
        "nan",
        "inf",
        "size",
        "none",
    ],
)
def test_weights_that_are_not_the_models(tmp_path, stranger, spoil, said):
    folder = shutil.copytree(stranger, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    spoil(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match=said):
        load(folder)


def test_a_whole_new_head_and_heads_of_other_tasks_are_no_damage(tmp_path, stranger):
    folder = shutil.copytree(stranger, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors["classifier.weight"], tensors["classifier.bias"]
    tensors["cls.predictions.bias"] = torch.ones(64)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder, labels=3).config.num_labels == 3


def test_a_masked_language_model_gets_a_pooler_and_says_so(tmp_path, stranger, caplog):
    folder = shutil.copytree(stranger, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if "pooler" in n or n.startswith("classifier")]:
        del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert load_model(folder, labels=2).config.num_labels == 2
    assert "no pooler: a new one is trained" in caplog.text


@pytest.mark.parametrize("name", ["../model/model.safetensors", "/etc/passwd", "..", "", "none", 7])
def test_shards_lie_in_the_folder(tmp_path, stranger, name):
    folder = shutil.copytree(stranger, tmp_path / "model")
    index = {"metadata": {}, "weight_map": {"classifier.weight": name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(DataError, match=r"index\.json: weight_map"):
        load(folder)


def test_no_weights_no_config_no_folder(tmp_path, stranger):
    folder = shutil.copytree(stranger, tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(DataError, match="no weights"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(DataError, match=r"config\.json: cannot be read"):
        load(folder)
    with pytest.raises(DataError, match="nowhere"):
        load(tmp_path / "nowhere")


@pytest.fixture(scope="module")
def worded(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("worded") / "model")


def test_tokenizers(tmp_path, worded, refused):
    folder = shutil.copytree(worded, tmp_path / "model")
    file = folder / "tokenizer.json"
    whole, ids = file.read_bytes(), load_tokenizer(folder)("the plot was gripping")["input_ids"]
    for what, spoiled in [*cuts(whole), *flips(whole, 12, within=400)]:
        file.write_bytes(spoiled)
        made = refused(lambda: load_tokenizer(folder), file, what)
        assert made is None or made("the plot was gripping")["input_ids"] == ids, what
    file.unlink()
    with pytest.raises(DataError, match="no tokenizer: none of"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(DataError, match="no tokenizer: none of"):
        load_tokenizer(folder)


def test_code_of_a_folder_never_runs_unasked(tmp_path, stranger, monkeypatch):
    folder = shutil.copytree(stranger, tmp_path / "model")
    mark = tmp_path / "ran"
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\n")
    body = json.loads((folder / "config.json").read_text())
    body |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.C"}}
    (folder / "config.json").write_text(json.dumps(body))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for read in (lambda: load(folder), lambda: load_tokenizer(folder)):
        with pytest.raises(DataError, match="model"):
            read()
    assert not mark.exists()
