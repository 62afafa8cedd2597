"""Parallel text becomes pairs of token ids. A pair lost, shifted or leaked into training would spoil every BLEU."""

import gzip
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from unroll.config import DatasetEntry, Source, load_dataset
from unroll.data import tokenizers
from unroll.data.shards import SampleReader, load_manifest, verify
from unroll.data.splits import HashSplit
from unroll.datasets import parallel_text
from unroll.errors import UserError

ROOT = Path(__file__).parents[2]
TRAIN = [(f"Der Hund {n} läuft.", f"The dog {n} runs.") for n in range(40)]
TEST = [("Eine Katze schläft.", "A cat sleeps."), ("", "nothing"), ("nichts", ""), ("Ein " * 60, "a " * 70)]
BPE = {"kind": "bpe", "vocabulary_size": 300}
Pairs = list[tuple[str, str]]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("UNROLL_MIRROR", raising=False)
    monkeypatch.setattr("unroll.data.sources.PIECE_BYTES", 50)
    monkeypatch.setattr("unroll.data.pairs.ENCODED_TOGETHER", 3)


def entry(sources: list[Source], **options: Any) -> DatasetEntry:
    options = {"source": "de", "target": "en", "tokenizer": BPE, "joint": True, **options}
    return DatasetEntry(preparer="parallel_text", licence="mine", sources=sources, options=options)


def files(root: Path, **splits: Pairs) -> list[Source]:
    sources = []
    for split, pairs in splits.items():
        for side, language in enumerate(("de", "en")):
            path = root / f"{split}.{language}"
            path.write_bytes("".join(f"{pair[side]}\n" for pair in pairs).encode())
            sources.append(Source(file=path.name, split=split, language=language))
    return sources


def prepare(root: Path, sources: list[Source], **options: Any) -> dict[str, Any]:
    prepared = parallel_text.prepare(entry(sources, **options), "mine", root, root / "out")
    assert prepared == verify(root / "out")
    return prepared


def samples(out: Path, split: str) -> list[dict[str, Any]]:
    reader = SampleReader(out, split)
    return [reader.sample(shard, i) for shard, count in enumerate(reader.shard_counts) for i in range(count)]


def pairs_of(out: Path, split: str) -> Pairs:
    return [(sample["source_text"], sample["target_text"]) for sample in samples(out, split)]


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "separate"])
@pytest.mark.parametrize("tokenizer", [BPE, {"kind": "characters", "unknown": True}, {"kind": "bytes"}])
def test_ids_spell_the_texts_of_every_pair_in_order(tmp_path: Path, tokenizer: dict[str, Any], joint: bool) -> None:
    test = [*TEST[:3], ("  Straße ", "line\u2028separator\r inside\ttab")]
    sources = files(tmp_path, train=TRAIN, test=test)
    prepared = prepare(tmp_path, sources, tokenizer=tokenizer, joint=joint)
    out = tmp_path / "out"
    sides = {"source": "source_tokenizer.json", "target": "tokenizer.json"}
    loaded = {side: tokenizers.load(out / name) for side, name in sides.items()}
    assert prepared["vocabulary"] == loaded["target"].vocabulary_size + 2
    assert prepared["source_vocabulary"] == loaded["source"].vocabulary_size + 2
    for split, expected in (("train", TRAIN), ("test", test)):
        assert pairs_of(out, split) == expected
        for number, sample in enumerate(samples(out, split)):
            assert sample["id"] == number
            for side, other in loaded.items():
                text = sample[f"{side}_text"]
                assert sample[side].tolist() == other.encode(text).tolist()
                known = "".join(c for c in text if c in getattr(other, "characters", text))
                assert other.decode(sample[side]).replace("\ufffd", "") == known


def test_joint_tokens_are_learnt_on_both_sides_and_separate_ones_on_their_own(tmp_path: Path) -> None:
    sources = files(tmp_path, train=[("xxx", "yyy"), ("x", "y")], test=[("x", "y")])
    options = {"tokenizer": {"kind": "characters"}, "skip_limit": 1.0}
    prepared = prepare(tmp_path, sources[:2], joint=True, **options)
    assert (prepared["source_vocabulary"], prepared["vocabulary"]) == (4, 4)
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (tmp_path / "out/source_tokenizer.json").read_bytes()
    prepared = prepare(tmp_path, sources[:2], joint=False, **options)
    assert (prepared["source_vocabulary"], prepared["vocabulary"]) == (3, 3)
    prepared = prepare(tmp_path, sources[:2], joint=False, source_tokenizer={"kind": "bytes"}, **options)
    assert (prepared["source_vocabulary"], prepared["vocabulary"]) == (258, 3)


def test_nothing_of_another_split_reaches_the_tokenizer(tmp_path: Path) -> None:
    sources = files(tmp_path, train=[("a", "b"), ("q ", "z")], test=[("Q", "c")])
    with pytest.raises(UserError, match=r"test\.de: line 1: character 0: 'Q' \(U\+0051\) is not in the training text"):
        prepare(tmp_path, sources, tokenizer={"kind": "characters"})


def test_lengths_for_the_plan_count_the_end_of_both_sides(tmp_path: Path) -> None:
    prepare(
        tmp_path,
        files(tmp_path, train=[("abc", "de"), ("f", "")] * 2, test=[("", "")]),
        tokenizer={"kind": "bytes"},
        skip_limit=1,
    )
    assert SampleReader(tmp_path / "out", "train").lengths(0).tolist() == [[3, 4]] * 2
    assert SampleReader(tmp_path / "out", "test").lengths(0).tolist() == [[1, 1]]


def test_training_pairs_are_skipped_by_reason_and_test_pairs_never(tmp_path: Path) -> None:
    bad = [
        ("", "empty source"),
        ("leeres Ziel", " \t"),
        (" eine katze SCHLÄFT. ", "a leak"),
        ("lang " * 30, "long"),
        ("kurz", "long " * 30),
        TRAIN[3],
    ]
    prepared = prepare(
        tmp_path, files(tmp_path, train=[*TRAIN, *bad], test=TEST), longest=25, drop_duplicates=True, tokenizer=BPE
    )
    skipped = {"empty_source": 1, "empty_target": 1, "in_other_split": 1, "duplicate": 1, "too_long": 2}
    assert prepared["skipped"] == skipped
    assert pairs_of(tmp_path / "out", "train") == TRAIN
    assert pairs_of(tmp_path / "out", "test") == TEST
    train, test = prepared["splits"]["train"], prepared["splits"]["test"]
    assert train["pairs_read"] == len(TRAIN) + sum(skipped.values())
    assert train["longest_source"] <= 25
    assert (test["empty"], test["over_longest"]) == (2, 1)


def test_duplicates_are_counted_and_kept_unless_asked(tmp_path: Path) -> None:
    again = [TRAIN[0], TRAIN[0], (TRAIN[0][0], "another translation")]
    sources = files(tmp_path, train=[*TRAIN, *again])
    kept = prepare(tmp_path, sources)
    assert kept["splits"]["train"]["duplicates"] == 2
    assert pairs_of(tmp_path / "out", "train") == [*TRAIN, *again]
    prepare(tmp_path, sources, drop_duplicates=True)
    assert pairs_of(tmp_path / "out", "train") == [*TRAIN, again[-1]]


def test_lowercase_is_what_the_tokenizers_see_and_texts_stay(tmp_path: Path) -> None:
    prepared = prepare(tmp_path, files(tmp_path, train=TRAIN, test=[("ÄHM Hund", "THE Dog")]), lowercase=True)
    tokenizer = tokenizers.load(tmp_path / "out/tokenizer.json")
    sample = samples(tmp_path / "out", "test")[0]
    assert prepared["lowercase"] is True
    assert (sample["source_text"], sample["target_text"]) == ("ÄHM Hund", "THE Dog")
    assert (tokenizer.decode(sample["source"]), tokenizer.decode(sample["target"])) == ("ähm hund", "the dog")


def test_a_limit_takes_the_first_pairs_of_each_split(tmp_path: Path) -> None:
    sources = files(tmp_path, train=TRAIN, test=TEST)
    prepare(tmp_path, sources, limit=2)
    assert pairs_of(tmp_path / "out", "train") == TRAIN[:2]
    assert pairs_of(tmp_path / "out", "test") == TEST[:2]


def test_preparing_again_and_from_packed_files_gives_the_same_bytes(tmp_path: Path) -> None:
    sources = files(tmp_path, train=TRAIN, test=TEST)
    packed = []
    for source in sources:
        (tmp_path / f"{source.file}.gz").write_bytes(gzip.compress((tmp_path / source.file).read_bytes()))
        packed.append(source.model_copy(update={"file": f"{source.file}.gz"}))
    for name, given in (("one", sources), ("two", sources), ("packed", packed)):
        parallel_text.prepare(entry(given), "mine", tmp_path, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.name == "manifest.json" or path.read_bytes() == (tmp_path / "packed" / path.name).read_bytes()


def test_line_ends_of_windows_and_a_missing_last_one_are_no_part_of_the_text(tmp_path: Path) -> None:
    (tmp_path / "train.de").write_bytes(b"eins\r\nzwei\r\n")
    (tmp_path / "train.en").write_bytes(b"one\ntwo")
    sources = [Source(file=f"train.{language}", split="train", language=language) for language in ("en", "de")]
    prepare(tmp_path, sources)
    assert pairs_of(tmp_path / "out", "train") == [("eins", "one"), ("zwei", "two")]


def test_progress_rises_to_its_end(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    given = entry(files(tmp_path, train=TRAIN, test=TEST), joint=False)
    parallel_text.prepare(given, "mine", tmp_path, tmp_path / "out", lambda *counts: seen.append(counts))
    done = [count for count, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {done[-1]}


# ---------------------------------------------------------------- tables

TABLE = [(f"satz {n % 70}.", f"sentence {n // 2}.") for n in range(300)]
COLUMNS = {"columns": {"de": 2, "en": 0}, "split_by": "en", "split": {"train": 0.8, "validation": 0.1, "test": 0.1}}


def table(root: Path, rows: Pairs) -> list[Source]:
    (root / "table.tsv").write_text("".join(f"{target}\tnote\t{source}\tmore\n" for source, target in rows))
    return [Source(file="table.tsv")]


def test_a_table_is_split_by_one_side_and_no_source_sentence_leaks(tmp_path: Path) -> None:
    rows = [*TABLE, ("satz x", "SENTENCE 3. ")]
    prepared = prepare(tmp_path, table(tmp_path, rows), **COLUMNS)
    splits = {split: pairs_of(tmp_path / "out", split) for split in ("train", "validation", "test")}
    found = {target.strip().lower(): split for split, pairs in splits.items() for _, target in pairs}
    for split, pairs in splits.items():
        assert {found[target.strip().lower()] for _, target in pairs} == {split}
    held_out = {source for split in ("validation", "test") for source, _ in splits[split]}
    assert held_out
    assert not held_out & {source for source, _ in splits["train"]}
    assert prepared["skipped"]["in_other_split"] == len(rows) - sum(map(len, splits.values())) > 0
    assert [row for row in rows if row in splits["train"]] == splits["train"]


def test_fractions_of_a_hash_split_are_met() -> None:
    split_of = HashSplit({"train": 0.8, "validation": 0.1, "test": 0.1})
    found = [split_of(f"text {n}") for n in range(5000)]
    assert found.count("train") / 5000 == pytest.approx(0.8, abs=0.02)
    assert found.count("test") / 5000 == pytest.approx(0.1, abs=0.015)
    assert split_of("Text 7 ") == split_of("text 7")


def test_the_embedded_extract_can_be_prepared_and_keeps_the_rules_of_its_script(tmp_path: Path) -> None:
    folder = ROOT / "data/embedded/tatoeba-de-en-small"
    given = load_dataset(ROOT, "tatoeba-de-en-small")
    given = given.model_copy(update={"options": {**given.options, "tokenizer": {"kind": "bytes"}, "limit": 50}})
    prepared = parallel_text.prepare(given, "small", ROOT, tmp_path / "out")
    assert [split["samples"] for split in prepared["splits"].values()] == [50, 50, 50]
    assert "CC BY 2.0" in (folder / "ATTRIBUTION.md").read_text()
    spec = importlib.util.spec_from_file_location("cut", folder / "cut.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    lines = (folder / "pairs.tsv").read_text().splitlines()
    rows = [(english, german) for english, german in (line.split("\t") for line in lines)]
    script.FREQUENT = 10_000  # in the extract itself the 800 most frequent words of the whole are not known
    assert script.cut(rows[::-1]) == rows
    assert len(rows) == script.PAIRS


# ---------------------------------------------------------------- mistakes


def mistake(root: Path, sources: list[Source], **options: Any) -> str:
    with pytest.raises(UserError) as error:
        parallel_text.prepare(entry(sources, **options), "mine", root, root / "out")
    assert "\n" not in str(error.value)
    assert not (root / "out").exists()
    assert not (root / "out.partial").exists()
    return str(error.value)


@pytest.mark.parametrize("tokenizer", [BPE, {"kind": "bytes"}])
@pytest.mark.parametrize(("german", "english"), [(12, 10), (10, 13), (10, 0)])
def test_files_of_different_length_are_both_named(tmp_path: Path, german: int, english: int, tokenizer: Any) -> None:
    sources = files(tmp_path, train=TRAIN[:20], test=TRAIN[20:])
    (tmp_path / "test.de").write_text("ein Satz\n" * german)
    (tmp_path / "test.en").write_text("a sentence\n" * english)
    message = mistake(tmp_path, sources, tokenizer=tokenizer)
    assert f"test.de has {german} lines" in message
    assert f"test.en has {english}; line n of one must be the translation of line n" in message


BAD_BYTES = [
    (b"zwei\0drei\n", "NUL byte"),
    (b"zw\xffei\n", "not UTF-8 (0xff: invalid start byte)"),
    (b"zwei \xc3\n", "not UTF-8 (0xc3: invalid continuation byte)"),
    (b"zwei \xc3", "not UTF-8 (0xc3: unexpected end of data)"),
]


@pytest.mark.parametrize("lines_before", [0, 1, 30])
@pytest.mark.parametrize(("line", "problem"), BAD_BYTES)
def test_bytes_that_are_no_text_are_named_with_their_line(
    tmp_path: Path, line: bytes, problem: str, lines_before: int
) -> None:
    sources = files(tmp_path, train=TRAIN, test=TRAIN)
    (tmp_path / "test.de").write_bytes("grün\n".encode() * lines_before + line)
    (tmp_path / "test.en").write_bytes(b"green\n" * (lines_before + 1))
    assert mistake(tmp_path, sources).endswith(f"test.de: line {lines_before + 1}: {problem}")


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unroll.data.sources.LINE_BYTES", 200)
    sources = files(tmp_path, train=[*TRAIN[:2], ("x" * 1000, "y")])
    assert "train.de: line 3: longer than 200 bytes" in mistake(tmp_path, sources)


def test_a_very_long_sentence_is_translated_in_test_and_skipped_in_training(tmp_path: Path) -> None:
    long = ("Wort " * 10_000, "word " * 10_000)
    prepared = prepare(tmp_path, files(tmp_path, train=[*TRAIN, long], test=[(long[0] + "!", long[1])]))
    assert prepared["skipped"]["too_long"] == 1
    assert len(samples(tmp_path / "out", "test")[0]["source"]) >= 10_000


def test_scripts_that_training_lacks_are_no_mistake_for_bpe(tmp_path: Path) -> None:
    text = "日本語 Ελλάδα 😀 \u0627\u0644"
    prepare(tmp_path, files(tmp_path, train=TRAIN, test=[(text, text)]))
    sample = samples(tmp_path / "out", "test")[0]
    assert tokenizers.load(tmp_path / "out/source_tokenizer.json").decode(sample["source"]) == text


def test_many_bad_pairs_fail(tmp_path: Path) -> None:
    sources = files(tmp_path, train=[*TRAIN, *[("", "x")] * 6])
    message = mistake(tmp_path, sources)
    assert "6 of 46 training pairs are empty or longer than 100 tokens (empty_source 6)" in message
    assert "options.skip_limit allows a share of 0.1" in message


def test_a_split_without_pairs_fails(tmp_path: Path) -> None:
    assert "split 'test' is empty" in mistake(tmp_path, files(tmp_path, train=TRAIN, test=[]))
    message = mistake(tmp_path, files(tmp_path, train=TRAIN[:3], test=TRAIN[:3]), tokenizer={"kind": "bytes"})
    assert "split 'train' is empty (skipped: in_other_split 3)" in message


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    sources = files(tmp_path, train=TRAIN)
    whole = gzip.compress((tmp_path / "train.de").read_bytes())
    (tmp_path / "train.de.gz").write_bytes(whole[:-20])
    sources[0] = Source(file="train.de.gz", split="train", language="de")
    assert "train.de.gz: damaged archive" in mistake(tmp_path, sources)


def test_another_content_than_stated_is_refused(tmp_path: Path) -> None:
    sources = files(tmp_path, train=TRAIN)
    sources[1] = sources[1].model_copy(update={"content_sha256": "0" * 64})
    assert f"train.en: content SHA-256 {'0' * 64} expected" in mistake(tmp_path, sources)


def test_a_row_with_too_few_columns_is_named(tmp_path: Path) -> None:
    sources = table(tmp_path, TABLE)
    with (tmp_path / "table.tsv").open("a") as file:
        file.write("only\ttwo\n")
    assert "table.tsv: line 301: 2 columns found, de is expected in column 2" in mistake(tmp_path, sources, **COLUMNS)


WRONG_OPTIONS = [
    ({"sorce": "de"}, "unknown key 'sorce'; did you mean 'source'?"),
    ({"target": "de"}, "source and target must be two languages"),
    ({"source_tokenizer": BPE}, "a joint tokenizer leaves no place for source_tokenizer"),
    ({"columns": {"de": 0, "en": 1}}, "a table needs columns, split_by and split; split_by, split is missing"),
    ({**COLUMNS, "columns": {"de": 0, "fr": 1}}, "columns must give de and en different columns"),
    ({**COLUMNS, "columns": {"de": 1, "en": 1}}, "columns must give de and en different columns"),
    ({**COLUMNS, "split_by": "fr"}, "split_by must be de or en"),
    ({**COLUMNS, "split": {"train": 0.5}}, "fractions must be above 0 and add up to 1"),
    (COLUMNS, "a table (options.columns) is exactly one source, without split and language"),
    ({"source": "fr"}, "split 'train': one source in fr and one in en expected, found de, en"),
]


@pytest.mark.parametrize(("options", "message"), WRONG_OPTIONS)
def test_options_that_do_not_fit_are_explained(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    found = mistake(tmp_path, files(tmp_path, train=TRAIN), **options)
    assert message in found
    assert "params.yaml: datasets.mine" in found


def test_sources_that_do_not_fit_are_explained(tmp_path: Path) -> None:
    sources = files(tmp_path, train=TRAIN, test=TEST)
    assert "split 'test': one source in de and one in en expected, found de" in mistake(tmp_path, sources[:3])
    assert "source train.de: split and language are expected" in mistake(tmp_path, [Source(file="train.de")])
    assert "no split is named 'train', found test" in mistake(tmp_path, sources[2:])
    assert "no split is named 'train', found none" in mistake(tmp_path, [])


def test_a_changed_source_tokenizer_is_noticed(tmp_path: Path) -> None:
    prepare(tmp_path, files(tmp_path, train=TRAIN))
    assert load_manifest(tmp_path / "out")["source_language"] == "de"
    (tmp_path / "out/source_tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"source_tokenizer\.json: SHA-256"):
        verify(tmp_path / "out")
