"""WikiTableQuestions: what becomes of a table and its questions, and one line for each way a file can be wrong."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from unroll.config import DatasetEntry, Recipe, Source
from unroll.data.shards import SampleReader, verify
from unroll.datasets import wiki_tables as wiki
from unroll.errors import UserError
from unroll.models.table_baseline import Config, Model
from unroll.tasks.table_questions import Task

TABLE = (
    '"Year","Host city","Winner (time)","Prize"\n'
    '"1991","Paris","Ann \\"Ace\\" Lee","$1,200"\n'
    '"June 5, 1994","Oslo","Bo Day","900"\n'
    '"1994","Paris","Ann \\"Ace\\" Lee","–"\n'
)
QUESTIONS = [
    ("nt-0", "in which year was oslo the host city?", "csv/1-csv/2.csv", "June 5, 1994"),
    ("nt-1", "how many times was paris the host?", "csv/1-csv/2.csv", "2"),
    ("nt-2", "who won in 1991?", "csv/1-csv/2.csv", 'Ann "Ace" Lee'),
    ("nt-3", "who never won?", "csv/1-csv/2.csv", "Cy"),
    ("nt-4", "which cities were hosts?", "csv/1-csv/2.csv", "Oslo|Paris"),
]


def written(questions: Any) -> str:
    return "".join("\t".join(fields) + "\n" for fields in [wiki.HEADER, *questions])


def project(root: Path, tables: dict[str, bytes | str] | None = None, questions: str | None = None) -> DatasetEntry:
    tables = {"csv/1-csv/2.csv": TABLE} if tables is None else tables
    with tarfile.open(root / "tables.tar.gz", "w:gz") as tar:
        for name, content in tables.items():
            data = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    text = written(QUESTIONS) if questions is None else questions
    for split in ("train", "validation", "test"):
        (root / f"{split}.tsv.gz").write_bytes(gzip.compress(text.encode()))
    sources = [Source(file="tables.tar.gz")]
    sources += [Source(file=f"{split}.tsv.gz", split=split) for split in ("train", "validation", "test")]
    return DatasetEntry(preparer="wiki_tables", licence="none", sources=sources, options={"minimum_count": 1})


def prepare(root: Path, **files: Any) -> dict[str, Any]:
    return wiki.prepare(project(root, **files), "wiki", root, root / "out")


def samples(root: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(root / "out", split)
    return [reader.sample(0, i) for i in range(reader.samples)]


def test_what_becomes_of_a_table_and_its_questions(tmp_path: Path) -> None:
    prepared = prepare(tmp_path)
    assert verify(tmp_path / "out") == prepared
    assert prepared["skipped"] == {
        "cut": 0,
        "test: unreachable": 1,
        "train: unreachable": 1,
        "validation: unreachable": 1,
    }
    train, test = samples(tmp_path, "train"), samples(tmp_path, "test")
    assert [sample["question_id"] for sample in train] == ["nt-0", "nt-1", "nt-2", "nt-4"]
    assert [sample["id"] for sample in test] == [0, 1, 2, 3, 4]
    year, times, winner, cities = train
    assert year["rows"][1][0] == pytest.approx(1994 + 5 / 12 + 4 / 372, abs=1e-3)
    assert [row[3] for row in year["rows"]] == [1200, 900, None]
    assert year["texts"][0][2] == 'Ann "Ace" Lee'
    assert year["cells"].tolist() == [4]
    assert year["matches"].tolist() == [5]
    assert year["column_matches"] == [1.0, 1.0, 0.0, 0.0]
    assert (times["answer"], times["cells"].tolist()) == (2.0, [])
    assert times["matches"].tolist() == [1, 9]
    assert (winner["cells"].tolist(), winner["parts"].tolist()) == ([2, 10], [1, 1])
    assert winner["numbers"] == [1991.0]
    assert winner["places"].tolist() == [3]
    assert (cities["cells"].tolist(), cities["parts"].tolist()) == ([1, 5, 9], [2, 1, 2])
    assert winner["frequent"].tolist() == [1, 2, 9, 10]


def test_the_rules_answer_by_what_they_say(tmp_path: Path) -> None:
    prepare(tmp_path)
    entry = {"name": "wiki", "suite": "tiny", "task": "table_questions", "dataset": "wiki", "evaluate": {},
             "model": {"name": "table_baseline"}, "train": {"counting": True}}  # fmt: skip
    task = Task(Recipe.model_validate(entry), tmp_path / "out")
    tensors = task.collate(samples(tmp_path, "test"), [])
    frequent = Model(Config(rule="most_frequent"), 9)
    task.fit(frequent)
    assert frequent(tensors).number.tolist() == [2.0] * 5
    overlap = Model(Config(rule="word_overlap"), 9)
    task.fit(overlap)
    says = overlap(tensors)
    said = [
        task.line(sample, row, says, list(overlap.names))["hypothesis"]
        for row, sample in enumerate(samples(tmp_path, "test"))
    ]
    assert said[0] == "June 5, 1994"
    assert torch.equal(says.cells.sum((1, 2)), torch.ones(5))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"questions": "id\tquestion\n"}, r"train.tsv.gz: line 1: header 'id\\tquestion' found"),
        ({"questions": written([("a", "b", "c")])}, "line 2: 3 fields found, 4 expected"),
        ({"questions": written([("a", " ", "c", "d")])}, "line 2: utterance is empty"),
        ({"questions": written([("a", "b", "csv/9.csv", "d")])}, "line 2: table 'csv/9.csv' is not in .*tables.tar.gz"),
        ({"tables": {"csv/1-csv/2.csv": TABLE + '"1"\n'}}, "csv/1-csv/2.csv: line 5: 1 cells found, the header has 4"),
        ({"tables": {"csv/1-csv/2.csv": TABLE + '"1","x'}}, "csv/1-csv/2.csv: line 5: not a table"),
        ({"tables": {"csv/1-csv/2.csv": TABLE.encode() + b"\xff\n"}}, "csv/1-csv/2.csv: line 5: not UTF-8"),
        ({"tables": {"csv/1-csv/2.csv": '"only","a","header"\n'}}, "a header and a row at least"),
        ({"tables": {"csv/1-csv/2.csv": ""}}, "line 0: a header and a row"),
        ({"tables": {"../csv.csv": TABLE}}, "leads out of its folder"),
    ],
)
def test_a_wrong_file_gets_one_line(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        prepare(tmp_path, **files)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_one_archive_is_needed(tmp_path: Path) -> None:
    entry = project(tmp_path)
    without = entry.model_copy(update={"sources": entry.sources[1:]})
    with pytest.raises(UserError, match="one archive of tables is needed, found 0"):
        wiki.prepare(without, "wiki", tmp_path, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "number"),
    [("4th", 4), ("1,234.5 km", 1234.5), ("-3", -3), ("−2", -2), ("$5", 5), ("May 2001", 2001 + 4 / 12), ("n/a", None),
     ("", None), ("9" * 40, None)],
)  # fmt: skip
def test_the_number_of_a_cell(text: str, number: float | None) -> None:
    found = wiki.cell_number(text)
    assert found is None if number is None else found == pytest.approx(number, abs=1e-3)
