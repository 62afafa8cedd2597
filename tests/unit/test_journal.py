"""The journal is the only record of a run that training itself writes: what is lost or doubled here stays so."""

import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unroll.errors import UserError
from unroll.journal import Journal, flatten, history, is_being_written, lines, public, read, system_metrics

WRITER = """
import sys
from pathlib import Path
from unroll.journal import Journal
journal = Journal(Path(sys.argv[1]))
print("open", flush=True)
step = 0
while True:
    step += 1
    journal.metrics(step, {"loss": 1 / step})
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "lstm-0123" / "seed-1"


def test_everything_written_is_read_back_in_order(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.tag({"recipe": "lstm", "seed": 1})
        journal.params({"model": {"width": 64, "cell": "lstm"}})
        journal.metrics(0, {"train/loss": 2.5}, time=1000.5)
        journal.artifact(folder / "samples.jsonl", "samples")
        journal.model(folder.parents[2] / "models" / "lstm", "lstm")
        journal.end("FINISHED")
    found = list(read(folder))
    assert [line["kind"] for line in found] == ["tag", "params", "metrics", "artifact", "model", "end"]
    assert found[2] == {"kind": "metrics", "time": 1000.5, "step": 0, "values": {"train/loss": 2.5}}
    assert (found[3]["path"], found[3]["to"]) == ("samples.jsonl", "samples")
    assert found[4]["path"] == "../../../models/lstm"
    assert all(abs(line["time"] - 1000.5) < 1e-6 or line["time"] > 1.7e9 for line in found)


def test_a_score_is_recorded_again_only_if_it_changed(folder: Path) -> None:
    """Evaluated anew with a corrected metric, a run must not keep its old score in the tracker."""
    evaluations = [{"test/bleu": 35.0, "test/ter": math.inf}, {"test/bleu": 35.0, "test/ter": math.inf}]
    evaluations.append({"test/bleu": 36.5, "test/ter": math.inf, "test/chrf": 50.0})
    for scores in evaluations:
        with Journal(folder) as journal:
            journal.scores(scores)
            journal.metrics(0, {"test/bleu": 1.0})  # training does replay its steps
    found = [line["values"] for line in read(folder)]
    assert found == [{"test/bleu": 35.0, "test/ter": math.inf}, {"test/bleu": 36.5, "test/chrf": 50.0}]


def test_a_torn_last_line_is_cut_and_the_run_goes_on(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 1.0})
    whole = (folder / "journal.jsonl").read_bytes()
    for torn in (whole[:-1], whole[:-20], whole[:1], whole + whole[:-1], whole + b"\0" * 9):
        (folder / "journal.jsonl").write_bytes(torn)
        with Journal(folder) as journal:
            journal.metrics(1, {"loss": 1.0}, time=5.0)
            journal.metrics(2, {"loss": 0.5})
        assert [point.step for point in history(folder)["loss"]] == [1, 2]
        assert all(json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines())


def test_replayed_steps_appear_once(folder: Path) -> None:
    with Journal(folder) as journal:
        for step in range(10):
            journal.metrics(step, {"loss": float(step)}, time=float(step))
    with Journal(folder) as journal:
        for step in range(5, 15):
            journal.metrics(step, {"loss": float(step), "later": 0.0}, time=100.0 + step)
    curves = history(folder)
    assert [point.step for point in curves["loss"]] == list(range(15))
    assert [point.time for point in curves["loss"]] == [*range(10), *range(110, 115)]
    assert [point.step for point in curves["later"]] == list(range(5, 15))


def test_repeated_parameters_and_tags_are_written_once_and_changes_are_kept(folder: Path) -> None:
    for width in (64, 64, 128):
        with Journal(folder) as journal:
            journal.params({"width": width, "betas": (0.9, 0.999)})
            journal.tag({"recipe": "lstm"})
    written = [line["values"] for line in read(folder)]
    assert written == [{"width": 64, "betas": [0.9, 0.999]}, {"recipe": "lstm"}, {"width": 128}]


def test_numbers_that_json_lacks_survive(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.metrics(3, {"nan": math.nan, "up": math.inf, "down": -math.inf})
        journal.params({"clip": math.inf, "nested": {"list": [math.nan, 1.0]}})
    for line in (folder / "journal.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    values = next(read(folder))["values"]
    assert math.isnan(values["nan"])
    assert (values["up"], values["down"]) == (math.inf, -math.inf)


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_full_or_read_only_disk_is_one_clear_line(
    folder: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    class Broken:
        def write(self, data: memoryview) -> int:
            raise OSError(code, "no")

    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 1.0})
        monkeypatch.setattr(journal, "_file", Broken())
        with pytest.raises(UserError, match=rf"journal\.jsonl: .*{words}"):
            journal.metrics(2, {"loss": 1.0})
        monkeypatch.undo()
        journal.metrics(2, {"loss": 1.0})  # what was refused is not taken for written
    assert [point.step for point in history(folder)["loss"]] == [1, 2]


def test_a_disk_that_takes_half_a_line_leaves_no_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(folder)
    journal.metrics(1, {"loss": 1.0})
    real = journal._file

    class Filling:
        def write(self, data: memoryview) -> int:
            if len(data) < 30:
                raise OSError(errno.ENOSPC, "no")
            return real.write(data[:30])

    monkeypatch.setattr(journal, "_file", Filling())
    with pytest.raises(UserError):
        journal.metrics(2, {"loss": 1.0})
    real.close()
    with Journal(folder) as journal:
        journal.metrics(2, {"loss": 1.0})
    assert [point.step for point in history(folder)["loss"]] == [1, 2]


def test_a_damaged_line_names_file_and_place(folder: Path) -> None:
    with Journal(folder) as journal:
        journal.metrics(1, {"loss": 1.0})
    path = folder / "journal.jsonl"
    place = path.stat().st_size
    path.write_bytes(path.read_bytes() + b"{broken\n")
    with pytest.raises(UserError, match=rf"journal\.jsonl: damaged at byte {place}"):
        Journal(folder)


def test_killed_at_any_moment_no_step_is_lost_or_doubled(folder: Path) -> None:
    seen, path = 0, folder / "journal.jsonl"
    for _ in range(3):
        size = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(folder)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        while not path.exists() or path.stat().st_size <= size + 200:  # a line or two
            time.sleep(0.001)
        assert is_being_written(folder)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert not is_being_written(folder)
        steps = [point.step for point in history(folder)["loss"]]
        assert steps == list(range(1, len(steps) + 1))
        assert len(steps) > seen
        seen = len(steps)


def test_two_processes_cannot_write_one_journal(folder: Path) -> None:
    with Journal(folder), pytest.raises(UserError, match="another process is writing it"):
        Journal(folder, patience=0.0)
    Journal(folder, patience=0.0).close()


def test_a_reader_of_a_growing_journal_sees_whole_lines_only(folder: Path) -> None:
    journal = Journal(folder)
    journal.metrics(1, {"loss": 1.0})
    journal._file.write(b'{"kind":"metrics","st')
    found = list(lines(folder))
    journal._file.write(b'ep":2,"time":1,"values":{"loss":2.0}}\n')
    journal.close()
    assert [line["step"] for line, _ in found] == [1]
    assert [line["step"] for line, _ in lines(folder, found[-1][1])] == [2]


@pytest.mark.parametrize("count", [1, 2, 99, 100, 101, 199, 200, 1234])
def test_thinned_curves_keep_both_ends(folder: Path, count: int) -> None:
    with Journal(folder) as journal:
        for step in range(count):
            journal.metrics(step, {"loss": float(step), "other": 0.0})
    points = history(folder, ["loss"], limit=100)["loss"]
    steps = [point.step for point in points]
    assert steps[0] == 0
    assert steps[-1] == count - 1
    assert steps == sorted(set(steps))
    assert len(steps) == count if count <= 100 else 50 <= len(steps) <= 100
    assert list(history(folder, ["loss"])) == ["loss"]
    assert history(folder)["loss"][-1].value == count - 1


def test_an_unknown_status_is_refused(folder: Path) -> None:
    with Journal(folder) as journal, pytest.raises(ValueError, match="allowed: FINISHED, FAILED, KILLED"):
        journal.end("DONE")


@pytest.mark.parametrize(
    ("private", "shown"),
    [
        ("/home/ann/texts/corpus.txt", "corpus.txt"),
        ("~/texts/corpus.txt", "corpus.txt"),
        ("read 'file:///home/ann/a.txt' twice", "read 'a.txt' twice"),
        ("path=/mnt/b/c.txt,/mnt/d", "path=c.txt,d"),
        ("https://ann:secret@example.org/a/b.zip", "https://example.org/a/b.zip"),
        ("https://example.org/a/b.zip", "https://example.org/a/b.zip"),
        ("train/loss and/or 1/2", "train/loss and/or 1/2"),
        ("data/embedded/input.txt", "data/embedded/input.txt"),
    ],
)
def test_folders_and_passwords_do_not_leave_the_machine(private: str, shown: str) -> None:
    assert public(private) == shown
    assert flatten({"a": {"b": private, "c": [private]}}) == {"a.b": shown, "a.c": json.dumps([shown])}


def test_system_metrics_are_those_of_this_process() -> None:
    system_metrics()
    total = sum(number * number for number in range(200_000))
    measured = system_metrics()
    assert total
    assert 5 < measured["system/rss_mb"] < 1e6
    assert 0 < measured["system/cpu_percent"] < 100 * (multiprocessing.cpu_count() + 1)


def test_the_journal_needs_neither_torch_nor_mlflow() -> None:
    code = "import sys, unroll.journal; print({'torch', 'mlflow', 'ray', 'psutil'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert found.stdout.strip() == "set()"
