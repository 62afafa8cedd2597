"""BLEU, chrF, TER and exact match must be the numbers that sacrebleu gives, for any corpus, with intervals and tests."""

import importlib
import json
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
from sacrebleu.metrics import BLEU, CHRF, TER
from sacrebleu.significance import PairedTest

from unroll.errors import UserError
from unroll.metrics import Score
from unroll.metrics.bootstrap import paired_bootstrap, paired_test

METRICS = ["bleu", "chrf", "ter", "exact_match"]
CORPUS_SCORES: dict[str, Callable[..., Any]] = {
    "bleu": sacrebleu.corpus_bleu,
    "chrf": sacrebleu.corpus_chrf,
    "ter": sacrebleu.corpus_ter,
}
TEXT = 'a dog runs over the green hill , and two men look at it ( slowly ) . Ein Hund läuft im "Schnee" & 3.5 km'
WORDS = TEXT.split()
Corpus = list[tuple[list[str], str]]  # references and hypothesis of each sentence


def metric(name: str) -> Any:
    return importlib.import_module(f"unroll.metrics.{name}")


def write(folder: Path, *lines: object) -> Path:
    """A predictions folder; a string is a line as it stands."""
    folder.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / "translations.jsonl").write_text(text, encoding="utf-8")
    return folder


def line(number: int, references: object, hypothesis: object, source: object = "ein Hund") -> dict[str, Any]:
    return {
        "id": number,
        "source": source,
        "references": references,
        "hypothesis": hypothesis,
        "score": -1.0,
        "tokens": 3,
    }


def write_corpus(folder: Path, corpus: Corpus) -> Path:
    return write(folder, *(line(number, *sentence) for number, sentence in enumerate(corpus)))


def corpus(seed: int, size: int = 60, references: int = 1, noise: float = 0.3, varying: bool = False) -> Corpus:
    """Made-up references, and hypotheses in which some words are others, doubled or gone; some are empty."""
    text, generator = np.random.default_rng(1), np.random.default_rng(seed)
    sentences = []
    for number in range(size):
        several = [list(text.choice(WORDS, text.integers(1, 15))) for _ in range(references)]
        kept = [word for word in several[0] if generator.random() > noise / 2]
        spoilt = [str(generator.choice(WORDS)) if generator.random() < noise else str(word) for word in kept]
        used = several[: 1 + number % references] if varying else several
        sentences.append(([" ".join(words) for words in used], "" if number % 17 == 3 else " ".join(spoilt)))
    return sentences


def streams(sentences: Corpus) -> tuple[list[str], list[list[str]]]:
    """Hypotheses and references as sacrebleu takes them."""
    columns = [list(column) for column in zip_longest(*(references for references, _ in sentences))]
    return [hypothesis for _, hypothesis in sentences], columns


@pytest.mark.parametrize("name", CORPUS_SCORES)
@pytest.mark.parametrize("kind", ["one reference", "three references", "some have more references", "all empty", "one"])
def test_the_score_is_exactly_that_of_sacrebleu(tmp_path: Path, name: str, kind: str) -> None:
    sentences = {
        "one reference": corpus(2),
        "three references": corpus(3, references=3),
        "some have more references": corpus(4, references=3, varying=True),
        "all empty": [(["a dog ."], ""), (["two men ."], "")],
        "one": [(["a dog runs over the hill .", "the dog runs ."], "a dog runs over it .")],
    }[kind]
    expected = CORPUS_SCORES[name](*streams(sentences))
    score = metric(name).compute(write_corpus(tmp_path, sentences), {})
    assert isinstance(score, Score)
    assert score.value == expected.score
    assert score.unit == expected.name
    assert score.n == len(sentences)
    if kind == "one":
        assert score.low is None
    else:
        assert score.low is not None
        assert score.high is not None
        assert score.low <= score.value <= score.high


@pytest.mark.parametrize(
    ("name", "options", "reference"),
    [
        ("bleu", {"lowercase": True}, BLEU(lowercase=True)),
        ("bleu", {"tokenize": "char"}, BLEU(tokenize="char")),
        ("chrf", {"lowercase": True, "word_order": 2}, CHRF(lowercase=True, word_order=2)),
        ("ter", {"case_sensitive": True, "normalized": True, "no_punct": True}, TER(True, True, False, True)),
    ],
)
def test_options_mean_what_they_mean_in_sacrebleu(
    tmp_path: Path, name: str, options: dict[str, Any], reference: Any
) -> None:
    sentences = [([" ".join(texts).upper()], hypothesis) for texts, hypothesis in corpus(5, noise=0.1)]
    expected = reference.corpus_score(*streams(sentences)).score
    score = metric(name).compute(write_corpus(tmp_path, sentences), options)
    assert score.value == expected
    assert score.value != metric(name).compute(tmp_path, {}).value
    assert score.signature == f"{reference.get_signature()}|bootstrap:2000|seed:1|v:1"


@pytest.mark.parametrize("name", CORPUS_SCORES)
@pytest.mark.parametrize("size", [2, 5, 200])
def test_scores_of_resampled_sums_are_those_of_sacrebleu(tmp_path: Path, name: str, size: int) -> None:
    """What intervals and tests are made of; small resamples have orders without a match or without an n-gram."""
    values = metric(name).statistics(write_corpus(tmp_path, corpus(6, size=60, noise=0.7)), {}).values
    drawn = np.random.default_rng(0).integers(0, len(values), (300, size))
    sums = values[drawn].sum(axis=1)  # [300,k]
    reference = {"bleu": BLEU(), "chrf": CHRF(), "ter": TER()}[name]
    counts = sums.astype(int).tolist() if name == "bleu" else sums.tolist()
    expected = [reference._compute_score_from_stats(row).score for row in counts]
    assert np.abs(metric(name).score(sums) - expected).max() < 1e-9
    assert metric(name).score(sums.reshape(3, 100, -1)).shape == (3, 100)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_p_values_are_those_of_sacrebleu(tmp_path: Path, name: str) -> None:
    """Its two tests on three pairs: clearly different, nearly so, and alike."""
    systems = [corpus(seed, size=120, noise=noise) for seed, noise in ((7, 0.30), (8, 0.55), (9, 0.36), (10, 0.31))]
    statistics = [metric(name).statistics(write_corpus(tmp_path / str(i), s), {}) for i, s in enumerate(systems)]
    assert all(statistics[0].comparable(other) for other in statistics)
    named = [(str(number), streams(sentences)[0]) for number, sentences in enumerate(systems)]
    reference = {"bleu": BLEU(), "chrf": CHRF()}[name]
    for kind, ours, samples in (("ar", paired_test, 2000), ("bs", paired_bootstrap, 1000)):
        _, table = PairedTest(named, {name: reference}, streams(systems[0])[1], kind, samples)()
        [column] = [results for key, results in table.items() if key != "System"]
        for other, result in enumerate(column[1:], start=1):
            found = ours(statistics[0].values, statistics[other].values, metric(name).score, samples)
            assert found == pytest.approx(result.p_value, abs=0.04)


@pytest.mark.parametrize("name", METRICS)
def test_the_order_of_lines_changes_nothing(tmp_path: Path, name: str) -> None:
    lines = [line(number, *sentence) for number, sentence in enumerate(corpus(11))]
    one, two = write(tmp_path / "one", *lines), write(tmp_path / "two", *lines[1::2], *lines[-2::-2])
    assert metric(name).compute(one, {}) == metric(name).compute(two, {})
    assert metric(name).statistics(one, {}).comparable(metric(name).statistics(two, {}))


@pytest.mark.parametrize("name", METRICS)
def test_systems_compare_on_the_same_references_and_options_alone(tmp_path: Path, name: str) -> None:
    sentences = corpus(12)
    other_system = [(references, "x") for references, _ in sentences]
    other_text = [([*references[:-1], references[-1] + " !"], hypothesis) for references, hypothesis in sentences]
    statistics = [
        metric(name).statistics(write_corpus(tmp_path / str(number), each), {})
        for number, each in enumerate([sentences, other_system, other_text, sentences[:-1]])
    ]
    assert [statistics[0].comparable(other) for other in statistics] == [True, True, False, False]


def test_scores_with_and_without_case_are_not_compared(tmp_path: Path) -> None:
    predictions = write_corpus(tmp_path, corpus(13))
    cased, more = metric("bleu").statistics(predictions, {}), metric("bleu").statistics(predictions, {"samples": 9})
    assert not cased.comparable(metric("bleu").statistics(predictions, {"lowercase": True}))
    assert cased.comparable(more)  # the number of resamples changes no statistic


def test_exact_match_by_hand(tmp_path: Path) -> None:
    lines = [line(0, ["a b", "c"], " c\n"), line(1, ["a"], "A"), line(2, ["d"], "d "), line(3, ["", "x"], "")]
    score = metric("exact_match").compute(write(tmp_path, *lines), {})
    assert (score.value, score.n, score.unit) == (75.0, 4, "% exact")
    assert score.signature == "sentences:4|bootstrap:2000|seed:1|v:1"


@pytest.mark.parametrize("name", METRICS)
def test_a_perfect_system_and_which_way_is_better(tmp_path: Path, name: str) -> None:
    sentences = [([text], text) for text in ("a dog runs over the hill .", "two men look at a green hill .")]
    score = metric(name).compute(write_corpus(tmp_path, sentences), {})
    assert metric(name).lower_is_better is (name == "ter")
    assert score.value == pytest.approx(0.0 if name == "ter" else 100.0)
    title, definition = metric(name).__doc__.splitlines()[0].split(": ", 1)
    assert title.lower().replace(" ", "_") == name
    assert "/" in definition or "*" in definition


GOOD = json.dumps(line(0, ["a"], "a"))


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"id": 1'], r"translations\.jsonl:2: not JSON"),
        ([GOOD, "7"], r"translations\.jsonl:2: found int, a JSON object is expected"),
        ([GOOD, {"references": ["a"], "hypothesis": "a"}], r"translations\.jsonl:2: 'id' is missing"),
        ([GOOD, line(-1, ["a"], "a")], r"translations\.jsonl:2: 'id' is -1, a whole number from 0 on"),
        ([GOOD, GOOD], r"translations\.jsonl:2: id 0 is there twice"),
        (
            [GOOD, line(2, ["a"], "a")],
            r"translations\.jsonl: sentence 1 is missing of 3; the predictions are incomplete",
        ),
        ([GOOD, line(1, [], "a")], r"translations\.jsonl:2: 'references' is \[\], a list of one or more strings"),
        ([GOOD, line(1, "a", "a")], r"translations\.jsonl:2: 'references' is 'a', a list"),
        ([GOOD, line(1, ["a", None], "a")], r"translations\.jsonl:2: 'references' is \['a', None\]"),
        ([GOOD, line(1, ["a"], None)], r"translations\.jsonl:2: 'hypothesis' is None, a string is expected"),
        ([GOOD, line(1, ["a"], "a", source=3)], r"translations\.jsonl:2: 'source' is 3, a string is expected"),
        ([], r"translations\.jsonl: no sentences"),
    ],
)
def test_damaged_predictions_are_named_with_their_line(
    tmp_path: Path, name: str, lines: list[object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as raised:
        metric(name).compute(write(tmp_path, *lines), {})
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", METRICS)
def test_missing_predictions_and_mistyped_options_are_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"translations\.jsonl: no such file; the predict stage writes it"):
        metric(name).compute(tmp_path, {})
    write(tmp_path, GOOD)
    with pytest.raises(UserError, match="unknown key 'sample'; did you mean 'samples'"):
        metric(name).compute(tmp_path, {"sample": 3})


def test_an_unknown_tokenizer_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenize: Input should be '13a', 'intl'.*found '13b'"):
        metric("bleu").compute(write(tmp_path, GOOD), {"tokenize": "13b"})


def test_text_that_is_no_proper_unicode_is_scored(tmp_path: Path) -> None:
    """A lone surrogate comes out of byte-level models; it must not end an evaluation."""
    sentences = [(["a \ud800 b\x00", "\u202e"], "a \udfff b"), ([""], "\u2028 x"), (["漢字 かな"], "漢字")]
    predictions = write_corpus(tmp_path, sentences)
    for name in METRICS:
        assert metric(name).compute(predictions, {}).n == 3
        assert len(metric(name).statistics(predictions, {}).values) == 3
