"""Stories with questions in the format of bAbI (Weston et al. 2015, arXiv:1502.05698), v1.2.

A line is `ID text` for a fact, or `ID question<TAB>answer<TAB>numbers of the supporting facts`; number 1 begins a new
story, and answers that are a list are separated by commas. A sample is a question with all facts before it.

A source is one such file that names its split, or an archive (.tar, .tar.gz) of files `qa<task>_<name>_train.txt` and
`..._test.txt`; of an archive, members are read and never unpacked. Task 3 may lack its training file (the archive of
the 10k flavour that is at hand does): a task without one is left out and named in the manifest, or its test stories are
shared out anew where `resplit` lists it, which the manifest says too. Such a task does not compare with others' scores.
"""

from __future__ import annotations

import re
import tarfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import Field

from unroll.config import DatasetEntry, Strict, check
from unroll.data.sources import Progress, RawFile, file_sha256, locate, no_progress
from unroll.data.stories import Story, StoryTokenizer, StoryWriter, words_of
from unroll.data.writers import write_manifest
from unroll.errors import UserError
from unroll.files import new_folder

MEMBER = re.compile(r"(?:.*/)?qa(\d+)_[\w-]+_(train|valid|test)\.txt")
LARGEST_FILE = 2**28
SPLITS = {"train": "train", "valid": "validation", "test": "test"}


class Options(Strict):
    """tasks: the tasks to take, all unless told. training_questions: so many of each task's first ones, validation
    included (1,000 is the size of bAbI's other flavour). validation: share of the training stories, every so manieth
    one. resplit: tasks without a training file whose test stories are shared out 6 : 1 : 3. lists: an answer of several
    words counts as one answer ("one", as in the literature) or as several. entities: names told apart, 0 for none."""

    tasks: list[int] | None = None
    training_questions: int | None = Field(None, ge=2)
    validation: float = Field(0.1, gt=0.0, le=0.5)
    resplit: tuple[int, ...] = ()
    lists: str = Field("one", pattern="^(one|several)$")
    entities: int = Field(0, ge=0, le=1000)


def prepare(entry: DatasetEntry, name: str, root: Path, out: Path, progress: Progress = no_progress) -> dict[str, Any]:
    """Write the prepared folder `out` and give its manifest. `progress` counts files.

    Raises:
        UserError: a source that is missing or wrong, a malformed line, no training stories, options that do not fit.
    """
    place = f"params.yaml: datasets.{name}"
    options: Options = check(Options, entry.options, f"{place}.options")
    read, hashes = _read(entry, root, place, options, progress)
    stories, absent, shared_out = _split(read, options, place)
    tokenizer = learn(stories["train"], options.entities)
    with new_folder(out) as folder:
        splits = {}
        for split, questions in stories.items():
            with StoryWriter(folder, split, tokenizer) as writer:
                for story in questions:
                    writer.write(story)
            by_task = Counter(story.task for story in questions)
            splits[split] = {**writer.summary, "questions": {str(task): by_task[task] for task in sorted(by_task)}}
        manifest = {
            "dataset": name,
            "preparer": "stories",
            "kind": "samples",
            "options": options.model_dump(mode="json"),
            "licence": entry.licence,
            "sources": hashes,
            **tokenizer.save(folder),
            "splits": splits,
            "tasks_without_training_file": absent,
            "tasks_split_from_their_test_file": shared_out,
            "skipped": {f"questions of task {task}, which has no training file": n for task, n in absent.items()},
        }
        return write_manifest(folder, manifest)


def learn(stories: Iterable[Story], entities: int = 0) -> StoryTokenizer:
    """Words and answers of the training stories, in the order of the alphabet."""
    words: set[str] = set()
    sentences: set[str] = set()
    answers: set[str] = set()
    for story in stories:
        sentences.update(story.facts)
        sentences.add(story.question)
        answers.update(story.answers)
    for sentence in sentences:
        words.update(word.lower() for word in words_of(sentence))
    return StoryTokenizer(sorted(words), sorted(answers), entities)


# ---------------------------------------------------------------- reading

Read = dict[int, dict[str, list[list[Story]]]]
"""Task -> split -> stories, each the list of its questions."""


def _read(
    entry: DatasetEntry, root: Path, place: str, options: Options, progress: Progress
) -> tuple[Read, list[dict[str, str]]]:
    if not entry.sources:
        raise UserError(f"{place}.sources: missing; a file in the format of bAbI for each split, or an archive of them")
    read: Read = defaultdict(dict)
    hashes = []
    for number, source in enumerate(entry.sources, 1):
        path = locate(source, root)
        if path.name.endswith((".tar", ".tar.gz", ".tgz")):
            for task, split, name, text in _members(path, options.tasks):
                read[task][split] = list(stories_of(text, f"{path}: {name}", task, options.lists))
        else:
            if source.split is None:
                raise UserError(f"{place}: source {source.file}: split is expected, or an archive of files of bAbI")
            read[0][source.split] = list(stories_of("\n".join(RawFile(path).lines()), str(path), 0, options.lists))
        hashes.append({"file": source.file, "sha256": file_sha256(path)})
        progress(number, len(entry.sources))
    missing = set(options.tasks or []) - set(read)
    if missing:
        raise UserError(f"{place}.options.tasks: no file of task {min(missing)} in the sources (found: {sorted(read)})")
    return dict(sorted(read.items())), hashes


def _members(path: Path, tasks: list[int] | None) -> Iterator[tuple[int, str, str, str]]:
    """(task, split, name, text) of the files of bAbI in an archive."""
    try:
        with tarfile.open(path, "r:*") as tar:
            for member in tar:
                found = MEMBER.fullmatch(member.name)
                if found is None or not member.isreg() or (tasks and int(found[1]) not in tasks):
                    continue
                if member.size > LARGEST_FILE:
                    raise UserError(f"{path}: {member.name}: {member.size} bytes, at most {LARGEST_FILE} are read")
                content = tar.extractfile(member)
                assert content is not None
                yield int(found[1]), SPLITS[found[2]], member.name, _decoded(content.read(), f"{path}: {member.name}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path}: damaged archive: {error}") from None


def _decoded(content: bytes, place: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{place}: line {line}: not UTF-8 at byte {error.start}") from None


def stories_of(text: str, place: str, task: int = 0, lists: str = "one") -> Iterator[list[Story]]:
    """The stories of a file in the format of bAbI, each the list of its questions; `place` names the file in errors.

    Raises:
        UserError: a line that is neither a fact nor a question, a number out of order, a question without an answer or
            with facts that do not exist, with file and line.
    """
    facts: list[str] = []
    number_of: dict[int, int] = {}
    questions: list[Story] = []
    last = 0
    for at, line in enumerate(text.splitlines(), 1):
        where = f"{place}: line {at}"
        if not line.strip():
            raise UserError(f"{where}: empty; 'number text' or 'number question<TAB>answer<TAB>facts' is expected")
        number_text, _, rest = line.strip().partition(" ")
        if not number_text.isdecimal() or not rest.strip():
            raise UserError(f"{where}: {line[:60]!r} found, 'number text' is expected")
        number = int(number_text)
        if number == 1:
            if questions:
                yield questions
            facts, number_of, questions = [], {}, []
        elif number != last + 1:
            raise UserError(f"{where}: number {number} found, {last + 1} or 1 (a new story) is expected")
        last = number
        if "\t" not in rest:
            number_of[number] = len(facts)
            facts = [*facts, rest.strip()]
            continue
        questions.append(_question(rest, facts, number_of, where, task, lists))
    if questions:
        yield questions


def _question(rest: str, facts: list[str], number_of: dict[int, int], where: str, task: int, lists: str) -> Story:
    question, answer, *support = (part.strip() for part in rest.split("\t"))
    if not question or not answer:
        raise UserError(f"{where}: {rest[:60]!r}: a question and its answer, separated by a tab, are expected")
    if not facts:
        raise UserError(f"{where}: the question {question!r} has no facts before it")
    numbers = " ".join(support).split()
    unknown = [n for n in numbers if not n.isdecimal() or int(n) not in number_of]
    if unknown:
        raise UserError(f"{where}: supporting fact {unknown[0]!r} is no fact before the question")
    answers = answer.split(",") if lists == "several" else [answer]
    return Story(facts, question, answers, [number_of[int(n)] for n in numbers], task, where)


# ---------------------------------------------------------------- splitting


def _split(read: Read, options: Options, place: str) -> tuple[dict[str, list[Story]], dict[str, int], list[int]]:
    """Stories of each split; questions of tasks left out, by task; tasks that were split anew."""
    stories: dict[str, list[Story]] = {"train": [], "validation": [], "test": []}
    absent: dict[str, int] = {}
    shared_out = []
    for task, splits in read.items():
        splits = dict(splits)
        if "train" not in splits and "test" in splits:
            if task not in options.resplit:
                absent[str(task)] = sum(map(len, splits["test"]))
                continue
            shared_out.append(task)
            test = splits["test"]
            parts = {"train": range(6), "validation": range(6, 7), "test": range(7, 10)}
            splits = {name: [s for i, s in enumerate(test) if i % 10 in tenths] for name, tenths in parts.items()}
        training = _first(splits.get("train", []), options.training_questions)
        if "validation" in splits:
            held_out = splits["validation"]
        else:
            every = round(1 / options.validation)
            held_out = training[every - 1 :: every]
            training = [story for i, story in enumerate(training) if i % every != every - 1]
        for name, found in (("train", training), ("validation", held_out), ("test", splits.get("test", []))):
            stories[name] += [question for story in found for question in story]
    for name, questions in stories.items():
        if not questions:
            raise UserError(f"{place}: no questions in split {name!r}; each of train and test needs a file")
    return stories, absent, shared_out


def _first(stories: list[list[Story]], questions: int | None) -> list[list[Story]]:
    """The first stories, so many that they have at most `questions` questions."""
    if questions is None:
        return stories
    kept, count = [], 0
    for story in stories:
        count += len(story)
        if count > questions:
            break
        kept.append(story)
    return kept
