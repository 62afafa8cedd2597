"""Scores of predictions files: the numbers a user publishes, and the line shown when the files are damaged."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unroll.errors import UserError
from unroll.metrics import Score

OVER_BLOCKS = ["perplexity", "nats_per_token", "bits_per_token", "nats_per_char", "bits_per_byte"]


def compute(metric: str, predictions: Path, **options: Any) -> Score:
    score = importlib.import_module(f"unroll.metrics.{metric}").compute(predictions, options)
    assert isinstance(score, Score)
    return score


def block(number: int, nats: object, tokens: int = 10, size: int = 40, characters: int = 20) -> dict[str, Any]:
    return {"block": number, "nats": nats, "tokens": tokens, "bytes": size, "characters": characters}


def write(folder: Path, *lines: object, name: str = "blocks.jsonl") -> Path:
    """A predictions folder with one file; a string is a line as it stands."""
    folder.mkdir(exist_ok=True)
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("metric", "value", "unit"),
    [
        ("perplexity", math.exp(60 / 30), "perplexity"),
        ("nats_per_token", 60 / 30, "nats/token"),
        ("bits_per_token", 60 / 30 / math.log(2), "bits/token"),
        ("nats_per_char", 60 / 48, "nats/char"),
        ("bits_per_byte", 60 / math.log(2) / 100, "bits/byte"),
    ],
)
def test_score_by_hand(tmp_path: Path, metric: str, value: float, unit: str) -> None:
    """Blocks of unequal length: totals are divided, ratios of blocks are not averaged."""
    predictions = write(tmp_path, block(0, 12.0, 10, 40, 20), block(1, 48.0, 20, 60, 28))
    score = compute(metric, predictions, samples=500, seed=7)
    assert score.value == pytest.approx(value, rel=1e-12)
    assert score.unit == unit
    assert score.n == 2
    assert score.signature == "blocks:2|bootstrap:500|seed:7|v:1"
    assert score.low is not None
    assert score.high is not None
    assert score.low <= score.value <= score.high


@pytest.mark.parametrize("metric", [*OVER_BLOCKS, "distinct_n"])
def test_every_metric_says_which_way_is_better_and_what_it_is(metric: str) -> None:
    module = importlib.import_module(f"unroll.metrics.{metric}")
    assert module.lower_is_better is (metric != "distinct_n")
    title, definition = module.__doc__.splitlines()[0].split(": ", 1)  # the report shows this line beside the name
    assert title.lower().replace(" ", "_").replace("-", "_").replace("character", "char") == metric
    assert "/" in definition


@pytest.mark.parametrize("metric", OVER_BLOCKS)
def test_score_does_not_depend_on_who_wrote_which_block_first(tmp_path: Path, metric: str) -> None:
    """Two ranks' parts joined in any order give the score and the interval of one worker, bit for bit."""
    generator = np.random.default_rng(0)
    lines = [block(i, float(generator.gamma(9, 3)), int(generator.integers(5, 20))) for i in range(40)]
    one = write(tmp_path / "one", *lines)
    two = write(tmp_path / "two", *lines[1::2], *lines[38::-2])
    assert compute(metric, one) == compute(metric, two)


@pytest.mark.parametrize("metric", OVER_BLOCKS)
def test_score_does_not_depend_on_how_the_text_is_cut(tmp_path: Path, metric: str) -> None:
    generator = np.random.default_rng(0)
    nats = generator.gamma(9, 3, 40)
    fine = write(tmp_path / "fine", *(block(i, float(n)) for i, n in enumerate(nats)))
    pairs = nats.reshape(20, 2).sum(axis=1)
    coarse = write(tmp_path / "coarse", *(block(i, float(n), 20, 80, 40) for i, n in enumerate(pairs)))
    assert compute(metric, fine).value == pytest.approx(compute(metric, coarse).value, rel=1e-13)


@pytest.mark.parametrize("metric", OVER_BLOCKS)
def test_statistics_give_the_score_back(tmp_path: Path, metric: str) -> None:
    """What paired tests are run on is what the score was computed from."""
    predictions = write(tmp_path, block(0, 12.0), block(1, 48.0, 20, 60, 28))
    module = importlib.import_module(f"unroll.metrics.{metric}")
    values = module.statistics(predictions, {}).values
    assert values.shape == (2, 2)
    assert compute(metric, predictions).value == pytest.approx(module.score(values.sum(axis=0)))


@pytest.mark.parametrize("metric", OVER_BLOCKS)
def test_only_systems_with_the_same_blocks_compare(tmp_path: Path, metric: str) -> None:
    """Other losses on the same blocks compare; blocks of other lengths, or fewer of them, do not."""
    lines = [
        [block(0, 12.0), block(1, 48.0)],
        [block(0, 9.0), block(1, 1.0)],
        [block(0, 12.0, 11, 41, 21), block(1, 8.0)],
    ]
    statistics = [
        importlib.import_module(f"unroll.metrics.{metric}").statistics(write(tmp_path / str(number), *entries), {})
        for number, entries in enumerate([*lines, lines[0][:1]])
    ]
    assert [statistics[0].comparable(other) for other in statistics] == [True, True, False, False]


@pytest.mark.parametrize("infinity", ['"inf"', "Infinity"])
@pytest.mark.parametrize("metric", OVER_BLOCKS)
def test_an_infinite_loss_makes_the_score_infinite_and_stays_valid_json(
    tmp_path: Path, metric: str, infinity: str
) -> None:
    """A maximum-likelihood n-gram meets an unseen symbol: perplexity is infinite, not skipped and not NaN."""
    bad = f'{{"block": 1, "nats": {infinity}, "tokens": 1, "bytes": 1, "characters": 1}}'
    score = compute(metric, write(tmp_path, block(0, 5.0), bad, *(block(i, 5.0) for i in range(2, 9))))
    assert score.value == math.inf
    assert score.high == math.inf
    written = json.dumps(score.to_json(), allow_nan=False)
    assert json.loads(written)["value"] == "inf"


def test_a_hopeless_model_has_infinite_perplexity_and_no_overflow(tmp_path: Path) -> None:
    assert compute("perplexity", write(tmp_path, block(0, 1e5), block(1, 1e5))).value == math.inf


def test_one_block_has_a_score_and_no_interval(tmp_path: Path) -> None:
    score = compute("nats_per_token", write(tmp_path, block(0, 5.0)))
    assert (score.value, score.low, score.high) == (0.5, None, None)


GOOD = json.dumps(block(0, 5.0))


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"block": 1, "nats"'], r"blocks\.jsonl:2: not JSON"),
        ([GOOD, "[1, 2]"], r"blocks\.jsonl:2: found list, a JSON object is expected"),
        ([GOOD, ""], r"blocks\.jsonl:2: not JSON"),
        ([GOOD, {"block": 1, "nats": 2.0, "bytes": 1, "characters": 1}], r"blocks\.jsonl:2: 'tokens' is missing"),
        ([GOOD, block(1, "many")], r"blocks\.jsonl:2: 'nats' is 'many', a number or \"inf\" is expected"),
        ([GOOD, block(1, None)], r"blocks\.jsonl:2: 'nats' is None"),
        ([GOOD, block(1, math.nan)], r"blocks\.jsonl:2: 'nats' is nan"),
        ([GOOD, block(1, -math.inf)], r"blocks\.jsonl:2: 'nats' is -inf"),
        ([GOOD, block(1, True)], r"blocks\.jsonl:2: 'nats' is True"),
        ([GOOD, block(1, 2.0, tokens=-1)], r"blocks\.jsonl:2: 'tokens' is -1, a whole number from 0 on"),
        ([GOOD, GOOD], r"blocks\.jsonl:2: block 0 is there twice"),
        ([GOOD, block(2, 1.0)], r"blocks\.jsonl: block 1 is missing of 3; the predictions are incomplete"),
        ([GOOD, block(1, 1.0, tokens=0)], r"blocks\.jsonl: block 1 has 0 tokens"),
        ([GOOD, "[" * 100_000], r"blocks\.jsonl:2: not readable"),
        ([GOOD, '{"block": ' + "1" * 5000 + "}"], r"blocks\.jsonl:2: not readable"),
        ([], r"blocks\.jsonl: no blocks"),
    ],
)
def test_damaged_predictions_are_named_with_their_line(tmp_path: Path, lines: list[object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute("perplexity", write(tmp_path, *lines))


def test_missing_predictions_name_the_file_and_the_stage_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"blocks\.jsonl: no such file; the predict stage writes it"):
        compute("bits_per_byte", tmp_path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "blocks.jsonl").write_bytes(b'{"block": 0}\xff\n')
    with pytest.raises(UserError, match=r"blocks\.jsonl:1: not UTF-8"):
        compute("perplexity", tmp_path)


@pytest.mark.parametrize("metric", [*OVER_BLOCKS, "distinct_n"])
def test_a_mistyped_option_is_refused_with_the_nearest_one(tmp_path: Path, metric: str) -> None:
    write(tmp_path, block(0, 5.0), block(1, 5.0))
    write(tmp_path, {"text": "a b"}, name="samples.jsonl")
    with pytest.raises(UserError, match="unknown key 'sample'; did you mean 'samples'"):
        compute(metric, tmp_path, sample=3)


@pytest.mark.parametrize(("n", "value"), [(1, 5 / 10), (2, 5 / 8), (3, 5 / 6)])
def test_distinct_n_by_hand(tmp_path: Path, n: int, value: float) -> None:
    """`a b a b` + `a b a c d e`: words a b c d e of 10; pairs ab ba ac cd de of 8; triples aba bab bac acd cde of 6."""
    predictions = write(tmp_path, {"text": "a b a b"}, {"text": "a  b\na c d e"}, name="samples.jsonl")
    assert compute("distinct_n", predictions, n=n).value == pytest.approx(value)


def test_distinct_n_sees_samples_that_repeat_each_other(tmp_path: Path) -> None:
    """A model that always says the same has few distinct n-grams though no sample repeats itself."""
    predictions = write(tmp_path, *[{"text": "to be or not"}] * 10, name="samples.jsonl")
    score = compute("distinct_n", predictions, n=1)
    assert (score.value, score.unit, score.n) == (4 / 40, "distinct-1", 10)
    assert score.signature == "samples:10|n:1|interval:jackknife|v:1"


def test_distinct_n_does_not_join_one_sample_to_the_next(tmp_path: Path) -> None:
    predictions = write(tmp_path, {"text": "a b"}, {"text": "c"}, {"text": "d"}, name="samples.jsonl")
    assert compute("distinct_n", predictions, n=2).value == 1.0


def test_distinct_n_of_one_sample_has_no_interval(tmp_path: Path) -> None:
    score = compute("distinct_n", write(tmp_path, {"text": "a b a"}, name="samples.jsonl"), n=1)
    assert (score.low, score.high) == (None, None)
    assert score.signature == "samples:1|n:1|interval:none|v:1"


def test_distinct_n_interval_covers_what_other_samples_give(tmp_path: Path) -> None:
    """60 sets of 30 samples of one model: the mean over sets lies in most of their intervals."""
    generator = np.random.default_rng(0)
    words = 1 / np.arange(1, 200) ** 1.2
    scores = []
    for number in range(60):
        texts = [" ".join(map(str, generator.choice(199, 25, p=words / words.sum()))) for _ in range(30)]
        predictions = write(tmp_path / str(number), *({"text": text} for text in texts), name="samples.jsonl")
        scores.append(compute("distinct_n", predictions, n=2))
    truth = np.mean([score.value for score in scores])
    held = np.mean([score.low <= truth <= score.high for score in scores if score.low and score.high])
    assert 0.85 <= held <= 1.0


def test_samples_too_short_for_one_pair_of_words_have_no_distinct_pair(tmp_path: Path) -> None:
    score = compute("distinct_n", write(tmp_path, {"text": "one"}, name="samples.jsonl"))
    assert (score.value, score.low, score.high) == (0.0, None, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": 7}, r"samples\.jsonl:1: 'text' is 7, a string is expected"),
        ({"prompt": "x"}, r"samples\.jsonl:1: 'text' is None"),
    ],
)
def test_damaged_samples_are_named_with_their_line(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compute("distinct_n", write(tmp_path, line, name="samples.jsonl"))


def test_distinct_n_refuses_other_lengths(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"\.n: .*less than or equal to 3, found 4"):
        compute("distinct_n", write(tmp_path, {"text": "a b"}, name="samples.jsonl"), n=4)
