"""`prepare` turns text into shards. Splits cut at another place, or text lost on the way, would spoil every result."""

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unroll.config import DatasetEntry, Source
from unroll.data import tokenizers
from unroll.data.shards import TokenStream, load_manifest, verify
from unroll.datasets import text
from unroll.errors import UserError

TEXT = "".join(f"line {i} \u00e9\u20ac and a few words\n" for i in range(40))


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNROLL_MIRROR", raising=False)
    monkeypatch.setattr("unroll.data.sources.PIECE_BYTES", 50)


def entry(sources: list[Source], **options: Any) -> DatasetEntry:
    options = {"tokenizer": {"kind": "characters"}, "record_tokens": 100, **options}
    return DatasetEntry(preparer="text", licence="mine", sources=sources, options=options)


def write(root: Path, **files: str) -> list[Source]:
    """A source for each file; the name up to `_` is its split."""
    for name, content in files.items():
        (root / f"{name}.txt").write_bytes(content.encode())
    return [Source(file=f"{name}.txt", split=name.partition("_")[0]) for name in files]


def own_text(root: Path, content: str = TEXT) -> list[Source]:
    (root / "my.txt").write_bytes(content.encode())
    return [Source(file="my.txt")]


def decoded(out: Path) -> dict[str, str]:
    tokenizer = tokenizers.load(out / "tokenizer.json")
    splits = {}
    for split in load_manifest(out)["splits"]:
        stream = TokenStream(out, split)
        splits[split] = tokenizer.decode(stream.read(0, stream.tokens))
    return splits


@pytest.mark.parametrize("kind", ["bytes", "characters", "bpe"])
def test_fractions_cut_at_floor_of_the_characters(tmp_path: Path, kind: str) -> None:
    tokenizer = {"kind": kind, **({"vocabulary_size": 300} if kind == "bpe" else {})}
    options = {"split": {"train": 0.7, "validation": 0.2, "test": 0.1}, "tokenizer": tokenizer}
    content = TEXT + "odd"
    prepared = text.prepare(entry(own_text(tmp_path, content), **options), "mine", tmp_path, tmp_path / "out")
    first, second = len(content) * 7 // 10, len(content) * 9 // 10
    assert decoded(tmp_path / "out") == {
        "train": content[:first],
        "validation": content[first:second],
        "test": content[second:],
    }
    assert prepared == verify(tmp_path / "out")
    for split, expected in decoded(tmp_path / "out").items():
        assert prepared["splits"][split]["characters"] == len(expected)
        assert prepared["splits"][split]["bytes"] == len(expected.encode())


def test_the_tokenizer_is_learnt_from_the_training_split_alone(tmp_path: Path) -> None:
    split = {"train": 0.5, "validation": 0.5}
    with pytest.raises(UserError, match=r"my\.txt: character 4: 'x' \(U\+0078\) is not in the training text"):
        text.prepare(entry(own_text(tmp_path, "aba" + "bxb"), split=split), "mine", tmp_path, tmp_path / "out")
    options = {"split": split, "tokenizer": {"kind": "words"}}
    text.prepare(entry(own_text(tmp_path, "a b a c "), **options), "mine", tmp_path, tmp_path / "out")
    assert decoded(tmp_path / "out") == {"train": "a b", "validation": "a <unk>"}


def test_sources_of_one_split_follow_each_other(tmp_path: Path) -> None:
    sources = write(tmp_path, train_1="ab", test="ba", train_2="ba\n")
    text.prepare(entry(sources), "mine", tmp_path, tmp_path / "out")
    assert decoded(tmp_path / "out") == {"train": "abba\n", "test": "ba"}
    text.prepare(entry(sources, tokenizer={"kind": "words"}), "mine", tmp_path, tmp_path / "out")
    assert decoded(tmp_path / "out")["train"] == "ab ba\n"


def test_a_limit_takes_the_first_characters_of_each_source(tmp_path: Path) -> None:
    sources = write(tmp_path, train="abcdef", test="fed")
    text.prepare(entry(sources, limit=4, tokenizer={"kind": "bytes"}), "mine", tmp_path, tmp_path / "out")
    assert decoded(tmp_path / "out") == {"train": "abcd", "test": "fed"}
    options = {"limit": 100, "split": {"train": 0.9, "test": 0.1}}
    text.prepare(entry(own_text(tmp_path), **options), "mine", tmp_path, tmp_path / "out")
    assert decoded(tmp_path / "out") == {"train": TEXT[:90], "test": TEXT[90:100]}


def test_packed_text_gives_the_same_data(tmp_path: Path) -> None:
    (tmp_path / "my.txt.gz").write_bytes(gzip.compress(TEXT.encode()))
    split = {"train": 0.9, "validation": 0.1}
    plain = text.prepare(entry(own_text(tmp_path), split=split), "mine", tmp_path, tmp_path / "plain")
    packed = text.prepare(entry([Source(file="my.txt.gz")], split=split), "mine", tmp_path, tmp_path / "packed")
    assert plain["splits"] == packed["splits"]
    assert plain["sources"][0]["sha256"] == packed["sources"][0]["sha256"]


def test_preparing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    options = {"split": {"train": 0.9, "validation": 0.1}, "tokenizer": {"kind": "bpe", "vocabulary_size": 280}}
    for name in ("one", "two"):
        text.prepare(entry(own_text(tmp_path), **options), "mine", tmp_path, tmp_path / name)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["manifest.json", "tokenizer.json", "train-00000.tar", "validation-00000.tar"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize("kind", ["bytes", "characters", "words"])
def test_progress_rises_to_its_end(tmp_path: Path, kind: str) -> None:
    seen: list[tuple[int, int]] = []
    options = {"split": {"train": 0.9, "validation": 0.1}, "tokenizer": {"kind": kind}}
    text.prepare(
        entry(own_text(tmp_path), **options), "m", tmp_path, tmp_path / "out", lambda *counts: seen.append(counts)
    )
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert seen[-1] == (seen[0][1], seen[0][1])
    assert seen[0][1] == len(TEXT.encode()) * (2 if kind == "bytes" else 3)


def test_wikitext_convention_on_its_own_format(tmp_path: Path) -> None:
    content = " \n = Title = \n \n one <unk> two . \n"
    sources = write(tmp_path, train=content)
    prepared = text.prepare(entry(sources, tokenizer={"kind": "words"}), "w", tmp_path, tmp_path / "out")
    assert prepared["splits"]["train"]["tokens"] == 3 + 4 + 4
    assert prepared["vocabulary"] == len({"<unk>", "<eos>", "=", "Title", "one", "two", "."})
    ids = TokenStream(tmp_path / "out", "train").read(0, 11)
    assert np.flatnonzero(ids == 1).tolist() == [0, 4, 5, 10]


WRONG_OPTIONS = [
    ({"split": {"train": 0.9, "validation": 0.2}}, "fractions must be above 0 and add up to 1"),
    ({"split": {"training": 0.9, "validation": 0.1}}, "no split is named 'train', found training, validation"),
    ({"split": {"train": 0.5, "../x": 0.5}}, "split '../x': a name of small letters, digits and _ is expected"),
    ({}, "source my.txt names no split, and options.split gives no fractions"),
    ({"tokeniser": {}}, "unknown key 'tokeniser'; did you mean 'tokenizer'?"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_options_that_do_not_fit_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        text.prepare(entry(own_text(tmp_path), **options), "mine", tmp_path, tmp_path / "out")
    assert message in str(error.value)
    assert "params.yaml: datasets.mine" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_fractions_need_one_source_without_a_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="fractions need exactly one source"):
        text.prepare(entry(write(tmp_path, train="ab"), split={"train": 1.0}), "m", tmp_path, tmp_path / "out")
