"""bAbI's format and generated stories: what a question may be answered from, names held out, one line for a bad file."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unroll.config import DatasetEntry, Source
from unroll.data.shards import SampleReader, verify
from unroll.data.stories import Story, StoryTokenizer, sentences_of, words_of
from unroll.datasets import generated_stories, stories
from unroll.errors import UserError

TRAIN = (
    "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Mary took the milk.\n5 What is Mary carrying?\tmilk,apple\t4 1\n1 Sandra is here.\n2 Where is Sandra?\there\t1\n"
)
TEST = "1 Bill went home.\n2 Where is Bill?\thome\t1\n"


def file_of(root: Path, name: str, text: str) -> Source:
    (root / name).write_text(text)
    return Source(file=name, split=name.partition(".")[0])


def prepare(root: Path, train: str = TRAIN, **options: Any) -> dict[str, Any]:
    sources = [
        file_of(root, "train.txt", train),
        file_of(root, "validation.txt", TEST),
        file_of(root, "test.txt", TEST),
    ]
    entry = DatasetEntry(preparer="stories", licence="none", sources=sources, options=options)
    return stories.prepare(entry, "own", root, root / "out")


def samples(folder: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(folder, split)
    return [reader.sample(shard, i) for shard, count in enumerate(reader.shard_counts) for i in range(count)]


def told(sample: dict[str, Any], tokenizer: StoryTokenizer) -> list[str]:
    parts = np.split(sample["facts"], np.cumsum(sample["fact_lengths"])[:-1])
    return [tokenizer.text(part, sample["names"]) for part in parts]


def test_a_question_has_the_facts_before_it_and_its_supporting_facts(tmp_path: Path) -> None:
    manifest = prepare(tmp_path)
    assert verify(tmp_path / "out") == manifest
    tokenizer = StoryTokenizer.load(tmp_path / "out" / "stories.json")
    first, second, third = samples(tmp_path / "out", "train")
    assert told(first, tokenizer) == ["mary moved to the bathroom", "john went to the hallway"]
    assert told(second, tokenizer)[2] == "mary took the milk"
    assert second["support"].tolist() == [2, 0]
    assert tokenizer.answer_text(int(second["answers"][0]), []) == "milk,apple"
    assert told(third, tokenizer) == ["sandra is here"]


def test_a_list_can_be_several_answers(tmp_path: Path) -> None:
    prepare(tmp_path, lists="several")
    tokenizer = StoryTokenizer.load(tmp_path / "out" / "stories.json")
    answers = samples(tmp_path / "out", "train")[1]["answers"]
    assert {tokenizer.answer_text(a, []) for a in answers.tolist()} == {"milk", "apple"}


def test_an_answer_that_training_never_gives_is_counted(tmp_path: Path) -> None:
    manifest = prepare(tmp_path)
    assert manifest["splits"]["test"]["answers_unknown"] == 1
    assert samples(tmp_path / "out", "test")[0]["answers"].tolist() == [0]


MALFORMED = [
    ("1 Mary is here.\n\n2 Where is Mary?\there\t1\n", "line 2: empty"),
    ("Mary is here.\n", "line 1: 'Mary is here.' found, 'number text' is expected"),
    ("1 Mary is here.\n3 Where is Mary?\there\t1\n", "line 2: number 3 found, 2 or 1 (a new story) is expected"),
    ("1 Where is Mary?\there\t1\n", "line 1: the question 'Where is Mary?' has no facts before it"),
    ("1 Mary is here.\n2 Where is Mary?\t\t1\n", "line 2: 'Where is Mary?"),
    ("1 Mary is here.\n2 Where is Mary?\there\t7\n", "line 2: supporting fact '7' is no fact before the question"),
    ("1 Mary is here.\n2 Where is Mary?\there\tx\n", "line 2: supporting fact 'x' is no fact"),
    ("1 ...\n2 Where is Mary?\there\t1\n", "line 2: the fact '...' has no words"),
]


@pytest.mark.parametrize(("text", "message"), MALFORMED)
def test_a_malformed_file_is_one_line_with_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        prepare(tmp_path, text)
    assert f"{tmp_path / 'train.txt'}: {message}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def archive(path: Path, files: dict[str, str]) -> Source:
    with tarfile.open(path, "w:gz") as tar:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text.encode())
            tar.addfile(member, io.BytesIO(text.encode()))
    return Source(file=path.name)


def many(count: int, first: str) -> str:
    return "".join(f"1 {first} is in room{i}.\n2 Where is {first}?\troom{i}\t1\n" for i in range(count))


def babi(root: Path, **options: Any) -> dict[str, Any]:
    files = {
        "qa1_one_train.txt": many(20, "Mary"),
        "qa1_one_test.txt": many(5, "Mary"),
        "qa3_three_test.txt": many(10, "John"),
        "../qa9_x_train.txt.sh": "not read",
    }
    entry = DatasetEntry(
        preparer="stories", licence="none", sources=[archive(root / "babi.tar.gz", files)], options=options
    )
    return stories.prepare(entry, "babi", root, root / "out")


def test_a_task_without_a_training_file_is_left_out_and_named(tmp_path: Path) -> None:
    manifest = babi(tmp_path)
    assert manifest["tasks_without_training_file"] == {"3": 10}
    assert manifest["skipped"] == {"questions of task 3, which has no training file": 10}
    assert manifest["splits"]["train"]["questions"] == {"1": 18}
    assert manifest["splits"]["validation"]["questions"] == {"1": 2}
    assert manifest["splits"]["test"]["questions"] == {"1": 5}


def test_a_task_split_from_its_test_file_is_marked(tmp_path: Path) -> None:
    manifest = babi(tmp_path, resplit=[3])
    assert manifest["tasks_split_from_their_test_file"] == [3]
    assert [manifest["splits"][s]["questions"]["3"] for s in ("train", "validation", "test")] == [6, 1, 3]


def test_fewer_training_questions_and_missing_tasks(tmp_path: Path) -> None:
    manifest = babi(tmp_path, training_questions=10)
    assert manifest["splits"]["train"]["questions"] == {"1": 9}
    with pytest.raises(UserError, match="no file of task 7 in the sources"):
        babi(tmp_path, tasks=[1, 7])


def test_words_and_sentences() -> None:
    assert words_of("Frodo's ring, at Mount-Doom (v1.2)!") == ["Frodo's", "ring", "at", "Mount-Doom", "v1.2"]
    assert sentences_of("He went. Where is he?\n\nThe End") == ["He went.", "Where is he?", "The End"]


# ---------------------------------------------------------------- generated stories


def generated(root: Path, **options: Any) -> dict[str, Any]:
    counts = {"train": 400, "validation": 50, "test": 120}
    entry = DatasetEntry(
        preparer="generated_stories", licence="none", options={"samples": counts, "names": 300, **options}
    )
    return generated_stories.prepare(entry, "stories", root, root / "out")


def test_no_name_of_test_is_in_training(tmp_path: Path) -> None:
    generated(tmp_path)
    names = {
        split: {name.lower() for sample in samples(tmp_path / "out", split) for name in sample["names"]}
        for split in ("train", "validation", "test")
    }
    assert len(names["test"]) > 50
    assert not names["test"] & (names["train"] | names["validation"])
    assert not names["train"] & names["validation"]


def test_words_of_the_patterns_alone_are_in_the_vocabulary(tmp_path: Path) -> None:
    generated(tmp_path)
    tokenizer = StoryTokenizer.load(tmp_path / "out" / "stories.json")
    for sample in samples(tmp_path / "out", "test"):
        assert not set(tokenizer.words) & {name.lower() for name in sample["names"]}
        assert not (sample["facts"] == 1).any()


def test_a_seed_decides_everything_and_splits_do_not_change_each_other(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    generated(tmp_path / "one")
    generated(tmp_path / "two", samples={"train": 100, "validation": 50, "test": 120})
    one, two = (samples(tmp_path / name / "out", "test") for name in ("one", "two"))
    assert [sample["facts"].tolist() for sample in one] == [sample["facts"].tolist() for sample in two]


def stories_of(count: int, **options: Any) -> list[Story]:
    settings = generated_stories.Options(samples={"train": count}, names=300, **options)
    return list(generated_stories.stories("train", count, settings, generated_stories.names_of(settings)["train"]))


def test_the_answer_to_where_a_person_is_stands_in_the_last_supporting_facts() -> None:
    """The places that are asked for are named in the facts that are said to support them, or in the one before."""
    checked = 0
    for story in stories_of(300):
        [answer] = story.answers
        if story.task in (1, 2, 3, 5) and answer != generated_stories.UNKNOWN:
            assert story.support
            assert any(answer in words_of(story.facts[number]) for number in story.support)
            checked += 1
    assert checked > 100


def test_where_people_are_follows_from_their_moves() -> None:
    """Told again by a simpler rule: whoever is said by name to move or be somewhere last is there."""
    checked = 0
    for story in stories_of(400, longest=12):
        person = words_of(story.question)[2] if story.task == 1 else None
        last = story.facts[-1]
        if (
            person
            and words_of(last)[0] == person
            and " to the " in last
            and not any(g in last for g in generated_stories.GIVES)
        ):
            assert list(story.answers) == [words_of(last)[-1]]
            checked += 1
    assert checked > 10


def test_several_answers_are_what_a_person_carries() -> None:
    asked = [story for story in stories_of(600, lists=True) if story.task == 6]
    assert any(len(story.answers) > 1 for story in asked)
    assert any(list(story.answers) == [generated_stories.NOTHING] for story in asked)


def test_names_are_numbered_as_they_come_and_too_many_are_refused() -> None:
    tokenizer = StoryTokenizer(["went", "to", "where", "is"], ["unknown"], entities=3)
    encoded = tokenizer.encode(Story(["Bilbo went to Bree"], "Where is bilbo"))
    assert encoded.names == ["Bilbo", "Bree"]
    assert encoded.facts[0][0] == encoded.question[2] == 2
    assert tokenizer.answer_ids(["bree"], encoded.names).tolist() == [2]
    with pytest.raises(UserError, match=r"story: 'd' is name number 4; .* 3 names"):
        tokenizer.encode(Story(["a b c d"], "Where is a"))
    with pytest.raises(UserError, match="the story has no facts before the question 'Where'"):
        tokenizer.encode(Story([], "Where"))
    with pytest.raises(UserError, match=r"the question '\?' has no words"):
        tokenizer.encode(Story(["a"], "?"))


def test_options_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shortest is above longest"):
        generated(tmp_path, shortest=30)
    with pytest.raises(UserError, match="no split is named 'train'"):
        generated(tmp_path, samples={"test": 5})
