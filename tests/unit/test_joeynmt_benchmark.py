"""The comparison with JoeyNMT is only fair if both read the same tokens and are timed over the same work."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from unroll.config import DatasetEntry
from unroll.data.tokenizers import BpeTokenizer, load
from unroll.datasets.parallel_text import prepare

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SENTENCES = [
    ("Zwei  junge Männer im Freien .", "Two young men are outside\u2028near bushes."),
    ("ein Hund\xa0rennt\tim Schnee", "a dog\x85runs in the snow"),
    ("<s> ist </s> kein Wort <pad>", "<unk> is no word 😀"),
    ("日本語", "   spaces around   "),
]
TEST = [("Ein \u2003 Mann", "a man"), ("x", "y")]


@pytest.fixture(scope="module")
def benchmark_module() -> Any:
    spec = importlib.util.spec_from_file_location("benchmark_joeynmt", BENCHMARKS / "joeynmt.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["benchmark_joeynmt"] = module
    spec.loader.exec_module(module)
    return module


def prepared(root: Path, test: list[tuple[str, str]]) -> Path:
    """A small prepared folder with the splits train (`SENTENCES`) and test."""
    sources = []
    for split, pairs in (("train", SENTENCES), ("test", test)):
        for side, language in enumerate(("de", "en")):
            file = f"{split}.{language}"
            (root / file).write_text("".join(f"{pair[side]}\n" for pair in pairs), encoding="utf-8")
            sources.append({"file": file, "split": split, "language": language})
    options = {"source": "de", "target": "en", "joint": True, "lowercase": True}
    options["tokenizer"] = {"kind": "bpe", "vocabulary_size": 300}
    entry = DatasetEntry.model_validate(
        {"preparer": "parallel_text", "licence": "none", "sources": sources, "options": options}
    )
    prepare(entry, "pairs", root, root / "prepared")
    return root / "prepared"


def as_joeynmt_reads(path: Path) -> list[list[str]]:
    """`joeynmt.helpers.read_list_from_file` and its tokenizer of level word."""
    return [line.rstrip("\n").split(" ") for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_text_holds_exactly_the_prepared_ids(benchmark_module: Any, tmp_path: Path) -> None:
    folder = prepared(tmp_path, TEST)
    tokenizer = load(folder / "tokenizer.json")
    words = benchmark_module.subwords(tokenizer)
    ids = {word: number for number, word in enumerate(words)}
    assert len(ids) == tokenizer.vocabulary_size
    for split, pairs in (("train", SENTENCES), ("test", TEST)):
        benchmark_module.write_text(folder, split, words, tmp_path / split)
        samples = list(benchmark_module.samples(folder, split))
        assert len(samples) == len(pairs)
        for side in ("source", "target"):
            lines = as_joeynmt_reads((tmp_path / split).with_suffix(f".{side}"))
            assert [[ids[word] for word in line] for line in lines] == [sample[side].tolist() for sample in samples]


def test_subwords_become_the_sentence_again(benchmark_module: Any, tmp_path: Path) -> None:
    folder = prepared(tmp_path, TEST)
    tokenizer = load(folder / "tokenizer.json")
    benchmark_module.write_text(folder, "train", benchmark_module.subwords(tokenizer), tmp_path / "train")
    sentences = benchmark_module.text_of(tokenizer, as_joeynmt_reads(tmp_path / "train.target"))
    assert sentences == [target.lower() for _, target in SENTENCES]


def test_only_so_many_sentences_are_written_as_asked_for(benchmark_module: Any, tmp_path: Path) -> None:
    folder = prepared(tmp_path, TEST)
    words = benchmark_module.subwords(load(folder / "tokenizer.json"))
    benchmark_module.write_text(folder, "train", words, tmp_path / "text", limit=2)
    assert len(as_joeynmt_reads(tmp_path / "text.source")) == len(as_joeynmt_reads(tmp_path / "text.target")) == 2


def test_an_empty_sentence_is_refused_since_joeynmt_would_shift_all_lines_after_it(
    benchmark_module: Any, tmp_path: Path
) -> None:
    folder = prepared(tmp_path, [*TEST, ("", "nothing")])
    words = benchmark_module.subwords(load(folder / "tokenizer.json"))
    with pytest.raises(SystemExit, match=f"split test: sentence {len(TEST)} has an empty source"):
        benchmark_module.write_text(folder, "test", words, tmp_path / "text")


@pytest.mark.parametrize("word", ["<pad>", "a b", "", "a\u2028b"])
def test_a_token_that_is_no_word_of_its_own_is_refused(benchmark_module: Any, word: str) -> None:
    tokenizer = BpeTokenizer({"a": 0, word: 1}, [])
    with pytest.raises(SystemExit, match="cannot be written"):
        benchmark_module.subwords(tokenizer)


# --- driving ----------------------------------------------------------------------------------------------------------

TOY = """
import sys
sys.path.insert(0, {folder!r})
from serve import Ended, Pace

updates = 0
pace = Pace({{"double": lambda number: {{"number": 2 * number, "updates": updates}}}}, parameters=3)
try:
    while True:
        pace.before_update(target_tokens=7)
        updates += 1
        print("a line that is no answer")
except Ended:
    print("stopped in good order", file=sys.stderr)
"""


def toy(benchmark_module: Any, folder: Path, code: str) -> Any:
    return benchmark_module.System("toy", [sys.executable, "-c", code], {}, folder / "log")


def test_a_turn_is_as_long_as_asked_for_and_counts_its_own_tokens(benchmark_module: Any, tmp_path: Path) -> None:
    with toy(benchmark_module, tmp_path, TOY.format(folder=str(BENCHMARKS / "joeynmt"))) as system:
        assert system.parameters == 3
        for updates in (3, 1, 5):
            answer = system.ask("train", updates=updates)
            assert (answer["updates"], answer["target_tokens"]) == (updates, 7 * updates)
            assert 0 < answer["seconds"] < 10
        assert system.ask("double", number=21) | {"peak_mb": 0} == {"number": 42, "updates": 9, "peak_mb": 0}
        answer = system.ask("train", seconds=0.05)
        assert answer["seconds"] >= 0.05
        assert answer["updates"] > 0
        assert answer["peak_mb"] > 1
    assert system.process.returncode == 0
    assert "stopped in good order" in (tmp_path / "log").read_text()


def test_a_system_that_dies_is_named_with_its_log(benchmark_module: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f"toy ended before it was asked to: see {tmp_path / 'log'}"):
        toy(benchmark_module, tmp_path, "raise ValueError('broken')")
    assert "broken" in (tmp_path / "log").read_text()


# --- figures ----------------------------------------------------------------------------------------------------------


def test_a_ratio_is_taken_within_turns(benchmark_module: Any) -> None:
    """Twice as slow a machine in the second turn moves both; the ratio stays."""
    theirs = [{"seconds": 1, "target_tokens": 100}, {"seconds": 2, "target_tokens": 100}]
    ours = [{"seconds": 1, "target_tokens": 300}, {"seconds": 2, "target_tokens": 300}]
    assert benchmark_module.ratio([theirs, ours], "target_tokens") == 3


def test_the_table_sets_ours_against_theirs(benchmark_module: Any) -> None:
    def system(factor: int) -> dict[str, list[dict[str, Any]]]:
        turn = {"seconds": 2.0, "target_tokens": 1000 * factor, "updates": 2, "peak_mb": 900.0 / factor}
        decoded = {"seconds": 10.0, "sentences": 100 * factor, "tokens": 1500 * factor}
        return {"training": [turn], "decoding": [decoded]}

    them, us = system(1), system(3)
    result = {
        "parameters": [100, 90],
        "minutes": 22,
        "training": [them["training"], us["training"]],
        "decoding": [them["decoding"], us["decoding"]],
        "bleu": [{"bleu": 30.0, "updates": 100}, {"bleu": 34.5, "updates": 250}],
    }
    rows = {row[0]: row[1:4] for row in benchmark_module.rows(result)}
    assert rows["target tokens/s, training"] == ("500", "1,500", "3.00")
    assert rows["peak memory of training, MB"] == ("900", "300", "0.33")
    assert rows["sentences/s, beam 5"] == ("10.0", "30.0", "3.00")
    assert rows["BLEU after 22 minutes"] == ("30.00", "34.50", "+4.50")


def test_nothing_for_a_gpu_is_installed(benchmark_module: Any) -> None:
    benchmark_module.refuse_cuda(["torch", "numpy"])
    with pytest.raises(SystemExit, match="nvidia-cublas"):
        benchmark_module.refuse_cuda(["torch", "nvidia-cublas-cu12", "torchvision"])
