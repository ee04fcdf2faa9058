"""SQuAD's JSON as it is read, and what is wrong with other JSON."""

from __future__ import annotations

import json

import pytest

from sensikernels._core.errors import DataError
from sensikernels.data import get_task, kind_of, load
from sensikernels.data.squad import read_questions
from tests.data.corpora import question, squad_json, write_squad

CONTEXT = "The film was good ."


def test_both_versions(tmp_path):
    one = write_squad(tmp_path / "train.json", (CONTEXT, [question("a", "what?", CONTEXT, "good")]))
    rows = read_questions(one)
    assert rows.items == [("a", "what?", CONTEXT, ((13, "good"),))]
    assert not rows.nulls
    none = question("b", "why?", CONTEXT, is_impossible=True, plausible_answers=[])
    some = question("c", " how? ", CONTEXT, "The film", "good", is_impossible=False)
    two = write_squad(tmp_path / "two.json", (CONTEXT, [none, some]), version="v2.0")
    rows = read_questions(two)
    assert [q.answers for q in rows.items] == [(), ((0, "The film"), (13, "good"))]
    assert rows.items[1].text == " how? "
    assert rows.nulls


@pytest.mark.parametrize("name", ["{}.json", "{}-v1.1.json", "{}-v2.0.json"])
def test_official_names(tmp_path, name):
    for split in ("train", "dev"):
        qas = [question(split, "what?", CONTEXT, "good")]
        write_squad(tmp_path / name.format(split), (CONTEXT, qas))
        assert load("squad", data_dir=tmp_path, split=split).items[0].id == split


def spoiled(**changes):
    made = squad_json((CONTEXT, [question("q", "what?", CONTEXT, "good")]))
    made["data"][0]["paragraphs"][0]["qas"][0] |= changes
    return made


MOVED = [{"answer_start": 12, "text": "good"}]
BAD = [
    ([], "data: expected a list, got none"),
    ({"data": {}}, "data: expected a list, got {}"),
    ({"data": []}, "no questions"),
    ({"data": [{}]}, r"data\[0\]: paragraphs: expected a list, got none"),
    ({"data": [{"paragraphs": [{}]}]}, r"data\[0\]\.paragraphs\[0\]: context: expected a string"),
    (spoiled(id=3), r"paragraphs\[0\]\.qas\[0\]: id: expected a string, got 3"),
    (spoiled(question=None), "question q: question: expected a string, got none"),
    (spoiled(answers=MOVED), "question q: answers: expected 'good' at character 12 .*, got ' goo'"),
    (spoiled(answers=[{"answer_start": -4, "text": "od ."}]), "at character -4 of the context"),
    (spoiled(answers=[{"answer_start": 4, "text": ""}]), "expected '' at character 4"),
    (spoiled(answers=[{"text": "good"}]), "answers: answer_start: expected a whole number"),
    (spoiled(is_impossible=1), "is_impossible: expected true or false, got 1"),
    (spoiled(is_impossible=True), "expected no answers, as is_impossible says, got 1"),
    (spoiled(is_impossible=False, answers=[]), "expected answers, as is_impossible is false"),
]


@pytest.mark.parametrize(("content", "said"), BAD, ids=[said for _, said in BAD])
def test_other_json(tmp_path, content, said):
    path = tmp_path / "dev.json"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=said) as caught:
        read_questions(path)
    assert str(caught.value).startswith(str(path))


def test_ids_twice_and_no_json(tmp_path):
    twice = [question("q", "what?", CONTEXT, "good")] * 2
    with pytest.raises(DataError, match="question q: expected an id of its own, got two"):
        read_questions(write_squad(tmp_path / "dev.json", (CONTEXT, twice)))
    (tmp_path / "dev.json").write_text("{")
    with pytest.raises(DataError, match=r"dev\.json: not JSON that can be read"):
        read_questions(tmp_path / "dev.json")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_questions(tmp_path / "none.json")


def test_versions_are_not_mixed(tmp_path):
    task = get_task("squad")
    some = [question("q", "what?", CONTEXT, "good", is_impossible=False)]
    none = [question("n", "why?", CONTEXT, is_impossible=True)]
    one = read_questions(write_squad(tmp_path / "one.json", (CONTEXT, some)))
    two = read_questions(write_squad(tmp_path / "two.json", (CONTEXT, some + none)))
    with pytest.raises(DataError, match=r"two\.json: expected answers to all questions as in"):
        kind_of(task).settle(task, one, two)
    settled = kind_of(task).settle(task, two, one)
    assert settled.dev.nulls  # trained with unanswerable questions, so it may say so
    assert settled.notes == ("questions: SQuAD v2.0, 1 of 2 unanswerable",)
    assert kind_of(task).settle(task, one, one).notes == ("questions: SQuAD v1.1",)


def test_real_files(squad_data_dir):
    sizes = {
        split: load("squad", data_dir=squad_data_dir, split=split) for split in ("train", "dev")
    }
    assert {split: len(rows) for split, rows in sizes.items()} == {"train": 11289, "dev": 4961}
    assert sum(len(q.answers) for q in sizes["dev"].items) == 17778
