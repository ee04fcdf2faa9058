from __future__ import annotations

import logging

import numpy as np
import pytest

from sensikernels._core.errors import DataError
from sensikernels.data.tasks import TASKS
from sensikernels.data.tsv import read, read_split
from tests.data.layout import line, lines, write


@pytest.mark.parametrize("split", ["train", "dev"])
def test_every_task_reads_its_own_layout(tmp_path, glue_task, split):
    write(tmp_path, glue_task, split, lines(glue_task))
    rows = read_split(glue_task, tmp_path, split)
    count = 3 if glue_task.regression else glue_task.num_labels
    assert rows.texts_a == [f'a "quoted {i} sentence ' for i in range(count)]
    if len(glue_task.texts) == 2:
        assert rows.texts_b == [f"its {i} twin's end" for i in range(count)]
    else:
        assert rows.texts_b is None
    if glue_task.regression:
        assert rows.labels.dtype == np.float32
        assert rows.labels.tolist() == [0.0, 2.75, 5.0]
    else:
        assert rows.labels.dtype == np.int64
        assert rows.labels.tolist() == list(range(count))
    assert len(rows) == count


def test_byte_order_mark_carriage_returns_and_no_last_line_feed(tmp_path):
    task = TASKS["mrpc"]
    path = write(tmp_path, task, "dev", lines(task))
    plain = read(task, path)
    path.write_bytes(
        b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").removesuffix(b"\r\n")
    )
    marked = read(task, path)
    assert (marked.texts_a, marked.texts_b) == (plain.texts_a, plain.texts_b)
    assert marked.labels.tolist() == plain.labels.tolist()


def test_only_a_line_feed_ends_a_line(tmp_path):
    task = TASKS["sst2"]
    odd = "next\x85line \u2028 form\x0cfeed \r here"
    path = write(tmp_path, task, "dev", ["sentence\tlabel", f"{odd}\t1"])
    assert read(task, path).texts_a == [odd]


def test_columns_are_found_by_name(tmp_path):
    task = TASKS["rte"]
    text = ["label\tsentence2\textra\tsentence1", "entailment\tsecond\t9\tfirst"]
    rows = read(task, write(tmp_path, task, "dev", text))
    assert (rows.texts_a, rows.texts_b) == (["first"], ["second"])


def test_mnli_dev_under_either_name(tmp_path):
    task = TASKS["mnli"]
    write(tmp_path, task, "dev", lines(task)[:2], name="dev.tsv")
    assert len(read_split(task, tmp_path, "dev")) == 1
    write(tmp_path, task, "dev", lines(task), name="dev_matched.tsv")
    assert len(read_split(task, tmp_path, "dev")) == 3
    with pytest.raises(DataError, match=r"MNLI/dev_mismatched\.tsv: no such file$"):
        read_split(TASKS["mnli-mm"], tmp_path, "dev")


@pytest.mark.parametrize(
    "change",
    [lambda row: row + "\tmore", lambda row: row.rpartition("\t")[0], lambda row: ""],
    ids=["long", "short", "blank"],
)
def test_malformed_line_is_named(tmp_path, glue_task, change):
    text = lines(glue_task)
    at = len(text)
    path = write(
        tmp_path, glue_task, "dev", [*text, *[change(text[-1])] * (glue_task.short_rows + 1)]
    )
    short = len(change(text[-1])) < len(text[-1])
    number = at + 1 + (glue_task.short_rows if short else 0)
    with pytest.raises(
        DataError, match=rf"dev.*\.tsv:{number}: expected \d+ tab-separated columns"
    ):
        read(glue_task, path)


def test_known_truncated_rows_are_dropped_aloud(tmp_path, caplog):
    task = TASKS["qqp"]
    text = [*lines(task), "cut off", line(task, "1", "one", "two")]
    with caplog.at_level(logging.WARNING):
        rows = read(task, write(tmp_path, task, "train", text))
    assert len(rows) == 3
    assert "truncated lines dropped: 4" in caplog.text


@pytest.mark.parametrize("bad", ["3", "-1", "", "entailmen", "0 ", "nan", "5.01", "inf"])
def test_label_out_of_range_is_named(tmp_path, glue_task, bad):
    if glue_task.regression:
        bad = {"3": "6", "0 ": "0,5"}.get(bad, bad)  # 3 and "0 " are scores
    text = lines(glue_task)
    texts = ["some", "words"][: len(glue_task.texts)]
    path = write(tmp_path, glue_task, "train", [*text, line(glue_task, bad, *texts)])
    with pytest.raises(DataError) as caught:
        read(glue_task, path)
    assert f"{path}:{len(text) + 1}: {glue_task.label}: expected" in str(caught.value)
    assert repr(bad) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_header_is_named(tmp_path):
    task = TASKS["sst2"]
    with pytest.raises(DataError, match=r":1: header: expected columns sentence, label, got a, b"):
        read(task, write(tmp_path, task, "dev", ["a\tb", "x\t1"]))


@pytest.mark.parametrize("text", [[], ["sentence\tlabel"]], ids=["empty", "header only"])
def test_no_rows(tmp_path, text):
    with pytest.raises(DataError, match="header: expected columns|no rows"):
        read(TASKS["sst2"], write(tmp_path, TASKS["sst2"], "dev", text))


def test_not_utf8_is_named(tmp_path):
    path = write(tmp_path, TASKS["sst2"], "dev", lines(TASKS["sst2"]))
    path.write_bytes(path.read_bytes() + b"caf\xe9\t1\n")
    with pytest.raises(DataError, match=r"dev\.tsv:4: not UTF-8 at byte 3"):
        read(TASKS["sst2"], path)


def test_missing_folders_and_files(tmp_path):
    task = TASKS["sst2"]
    with pytest.raises(DataError, match="none: no such folder; expected the one that holds SST-2/"):
        read_split(task, tmp_path / "none", "dev")
    with pytest.raises(DataError, match="SST-2: no such folder; SST-2 is read from"):
        read_split(task, tmp_path, "dev")
    (tmp_path / "SST-2" / "dev.tsv").mkdir(parents=True)
    with pytest.raises(DataError, match=r"SST-2/dev\.tsv: no such file"):
        read_split(task, tmp_path, "dev")
    (tmp_path / "MNLI").mkdir()
    with pytest.raises(DataError, match=r"dev_matched\.tsv: no such file \(nor dev\.tsv\)"):
        read_split(TASKS["mnli"], tmp_path, "dev")
