"""Two-column files as people write them, and what is wrong with others."""

from __future__ import annotations

import pytest

from sensikernels._core.errors import DataError, UsageError
from sensikernels.data import get_task, kind_of, load
from sensikernels.data.conll import check_tags, read_words, tag_set


@pytest.fixture
def read(tmp_path):
    def make(text, name="train.conll"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return read_words(path)

    return make


def pairs(rows):
    return [list(zip(w, t, strict=True)) for w, t in zip(rows.words, rows.tags, strict=True)]


@pytest.mark.parametrize(
    "text",
    [
        "a\tO\nb\tB-X\n\nc\tO\n",
        "a O\nb B-X\n\nc O",
        "a   O\nb  B-X  \n \t \nc O\n",
        "\n\na\tO\r\nb\tB-X\r\n\r\n\r\nc\tO\r\n\r\n",
        "-DOCSTART-\tO\n\na\tO\nb\tB-X\n\t\n-DOCSTART- -X- -X- O\nc\tO\n",
        "a\tO\nb\tB-X\n-DOCSTART- O\nc\tO\n",
        b"\xef\xbb\xbfa\tO\nb\tB-X\n\nc\tO\n",
        "a \t O\nb\tB-X\n\nc\tO\n",
    ],
)
def test_the_same_two_sentences(read, text):
    rows = read(text)
    assert pairs(rows) == [[("a", "O"), ("b", "B-X")], [("c", "O")]]
    assert tag_set(rows) == ("O", "B-X")


def test_what_only_looks_like_a_blank_stays(read):
    rows = read("\u200b\tO\n\u00a0\tO\nx\u2028y\tB-X\nNew York\tI-X\n")
    assert rows.words == [["\u200b", "\u00a0", "x\u2028y", "New York"]]


def test_o_is_first_whatever_the_order_and_even_if_absent(read):
    assert tag_set(read("a B-B\nb I-A\nc B-A\n")) == ("O", "B-A", "B-B", "I-A")


@pytest.mark.parametrize(
    ("line", "number"),
    [("a\n", 3), ("a\tb\tO\n", 3), ("a -X- O\n", 3), ("\tO\n", 3), ("a\t\n", 3), ("a\t \tO\n", 3)],
)
def test_malformed_lines_name_file_and_line(read, tmp_path, line, number):
    with pytest.raises(DataError) as caught:
        read("x\tO\n\n" + line)
    assert str(caught.value).startswith(f"{tmp_path / 'train.conll'}:{number}: expected a word and")
    assert repr(line.rstrip("\n")) in str(caught.value)


def test_bytes_that_are_no_text(read):
    with pytest.raises(DataError, match=r"train\.conll:2: not UTF-8 at byte 1"):
        read(b"a\tO\nx\xff\tO\n")


@pytest.mark.parametrize("text", ["", "\n\n", "-DOCSTART- O\n"])
def test_no_words(read, text):
    with pytest.raises(DataError, match="no words"):
        read(text)


def test_only_o(read):
    with pytest.raises(DataError, match="expected tags of entities, got O alone"):
        tag_set(read("a O\n"))


def test_a_dev_tag_that_train_lacks(read, tmp_path):
    dev = read("a O\n\nb O\nc B-Y\n", "dev.conll")
    said = rf"^{tmp_path}/dev\.conll:4: tag: expected one of the training file's, O, B-X, got 'B-Y'"
    with pytest.raises(DataError, match=said):
        check_tags(dev, ("O", "B-X"))


@pytest.mark.parametrize(("train", "dev"), [("conll", "conll"), ("txt", "txt")])
@pytest.mark.parametrize("name", ["dev", "valid"])
def test_names_of_files(tmp_path, train, dev, name):
    (tmp_path / f"train.{train}").write_text("a O\nb B-X\n")
    (tmp_path / f"{name}.{dev}").write_text("c O\n")
    assert load("ner", data_dir=tmp_path, split="train").words == [["a", "b"]]
    assert load("ner", data_dir=tmp_path, split="dev").words == [["c"]]


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(DataError, match=r"train\.conll: no such file \(nor train\.txt\)"):
        load("ner", data_dir=tmp_path, split="train")
    with pytest.raises(DataError, match=r"no such folder; expected the one that holds dev\.conll"):
        load("ner", data_dir=tmp_path / "no", split="dev")
    with pytest.raises(UsageError, match=r"data_dir: expected a folder that holds train\.conll"):
        load("ner", split="train")


def test_real_files(ner_data_dir):
    task = get_task("ner")
    train, dev = (load("ner", data_dir=ner_data_dir, split=s) for s in ("train", "dev"))
    assert (len(train), len(dev)) == (3394, 1009)
    assert sum(map(len, train.words)), sum(map(len, dev.words)) == (62730, 15733)
    settled = kind_of(task).settle(task, train, dev)
    assert len(settled.task.label_names) == 13
    assert settled.task.label_names[0] == "O"
    assert any("\ufeff" in word for words in dev.words for word in words)
