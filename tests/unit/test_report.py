"""The report must rank rightly, claim no more than was measured, and be the same file for the same inputs."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_suite import HOSTILE, SENTENCES, write_json, write_lines, write_suite, write_system, write_translations

from unroll.errors import UserError
from unroll.report import formatting, plots, results_page, tables, view
from unroll.report.build import build, html
from unroll.report.leaderboard import Leaderboard, holm, load


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_suite(tmp_path_factory.mktemp("suite"))


@pytest.fixture
def suite(original: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(original, tmp_path, dirs_exist_ok=True))


@pytest.fixture
def pictures() -> None:
    """Asked for by tests whose page needs its pictures; drawing takes most of the time of a page."""


@pytest.fixture(autouse=True)
def _no_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("bars", "by_length", "losses", "gradient_norms") if "pictures" not in request.fixturenames else ():
        monkeypatch.setattr(plots, name, lambda *_: None)


def board_of(root: Path, expected: tuple[str, ...] = ()) -> Leaderboard:
    return load("demo", root / "results" / "demo", root / "evaluations" / "demo", expected)


def page_of(root: Path) -> str:
    path = build("demo", root / "results" / "demo", root / "evaluations" / "demo", root / "reports" / "demo")
    return path.read_text(encoding="utf-8")


def change(root: Path, recipe: str, edit: Callable[[dict[str, Any]], object]) -> None:
    """Edit one results file."""
    path = root / "results" / "demo" / f"{recipe}.json"
    content = json.loads(path.read_text())
    edit(content)
    write_json(path, content)


def order(root: Path) -> list[str]:
    return [system.result.recipe for system in board_of(root).groups[0].systems]


# What the leaderboard says


def test_systems_are_ranked_by_the_primary_metric(suite: Path) -> None:
    assert order(suite) == ["dilated", "lstm", "kneser-ney-6", "feedforward", "bigram"]


def test_an_infinite_score_comes_after_every_finite_one(suite: Path, pictures: None) -> None:
    change(suite, "dilated", lambda content: content["metrics"]["nats_per_char"].update(value="inf", high="inf"))
    assert order(suite)[-1] == "dilated"
    page = page_of(suite)
    assert "∞" in page
    written = json.loads((suite / "reports/demo/leaderboard.json").read_text())
    assert written["groups"][0]["systems"][-1]["score"]["value"] == "inf"


def test_a_metric_where_more_is_better_is_ranked_the_other_way(suite: Path) -> None:
    for number, recipe in enumerate(order(suite)):
        score = {"value": 0.1 * number, "n": 4, "unit": "distinct-2", "signature": "s"}
        change(suite, recipe, lambda content, score=score: content["metrics"].update(distinct_n=score))
        change(suite, recipe, lambda content: content.update(primary="distinct_n"))
    assert order(suite) == ["bigram", "feedforward", "kneser-ney-6", "lstm", "dilated"]
    assert "higher is better" in page_of(suite)


def test_only_systems_on_one_test_set_and_metric_share_a_table(suite: Path) -> None:
    change(suite, "lstm", lambda content: content.update(split="test"))
    change(suite, "dilated", lambda content: content.update(dataset="wikitext-2"))
    change(suite, "feedforward", lambda content: content.update(primary="perplexity"))
    groups = [(g.dataset, g.split, g.metric, len(g.systems)) for g in board_of(suite).groups]
    assert groups == [
        ("tiny-shakespeare", "test", "nats_per_char", 1),
        ("tiny-shakespeare", "validation", "nats_per_char", 2),
        ("tiny-shakespeare", "validation", "perplexity", 1),
        ("wikitext-2", "validation", "nats_per_char", 1),
    ]
    assert page_of(suite).count('<table class="leaderboard"') == 4


def test_holm_by_hand() -> None:
    """Three tests: the least p is tripled, the next doubled, and no corrected p is below one before it."""
    corrected = holm({("a", "b"): 0.01, ("a", "c"): 0.04, ("b", "c"): 0.03})
    assert corrected == pytest.approx({("a", "b"): 0.03, ("b", "c"): 0.06, ("a", "c"): 0.06})
    assert holm({("a", "b"): 0.8, ("a", "c"): 0.9}) == {("a", "b"): 1.0, ("a", "c"): 1.0}
    assert holm({}) == {}


def test_only_real_differences_are_marked_as_differences(suite: Path) -> None:
    """LSTM and dilated convolutions were made to differ by less than their noise; the others by much more."""
    group = board_of(suite).groups[0]
    standings = [group.standing(system) for system in group.systems]
    assert standings == ["best", "tied", "worse", "worse", "worse"]
    assert len(group.p_values) == 10
    assert group.p_value(group.systems[1], group.systems[0]) == group.p_value(group.systems[0], group.systems[1])
    assert view.mark(group, group.systems[4]) == "worse, p < 0.001"


@pytest.mark.parametrize("damage", ["other blocks", "fewer blocks", "no file"])
def test_systems_without_the_same_blocks_are_not_tested(suite: Path, damage: str) -> None:
    path = suite / "evaluations" / "demo" / "kneser-ney-6" / "statistics.json"
    statistics = json.loads(path.read_text())["nats_per_char"]
    if damage == "other blocks":
        statistics["conditions"] = "other blocks"
    if damage == "fewer blocks":
        statistics["values"] = statistics["values"][:50]
    write_json(path, {"nats_per_char": statistics})
    if damage == "no file":
        path.unlink()
    group = board_of(suite).groups[0]
    assert group.standing(group.systems[2]) == "untested"
    assert view.mark(group, group.systems[2]) == "not tested"
    assert len(group.p_values) == 6


# Translators


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_translations(tmp_path_factory.mktemp("translators"), "demo")


@pytest.fixture
def translation(translators: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(translators, tmp_path, dirs_exist_ok=True))


def test_systems_with_other_tokenizers_share_the_table_of_their_test_set(translation: Path) -> None:
    [group] = board_of(translation).groups
    assert (group.dataset, group.split, group.metric) == ("multi30k-de-en", "test_2016_flickr", "bleu")
    assert [s.result.recipe for s in group.systems] == ["attention_bpe", "attention", "no_attention"]
    assert {s.result.dataset for s in group.systems} == {"multi30k-de-en", "multi30k-de-en-bpe"}
    assert len(group.p_values) == len(group.bootstrap_p_values) == 3
    assert [group.standing(system) for system in group.systems] == ["best", "worse", "worse"]


def test_systems_scored_on_other_references_are_not_tested_against_each_other(translation: Path) -> None:
    """The name of the test set is a claim; the hash of the references decides."""
    path = translation / "evaluations" / "demo" / "attention" / "statistics.json"
    statistics = json.loads(path.read_text())
    statistics["bleu"]["conditions"] = "0" * 64
    write_json(path, statistics)
    group = board_of(translation).groups[0]
    assert view.mark(group, group.systems[1]) == "not tested"
    assert list(group.p_values) == [("attention_bpe", "no_attention")]


def test_scores_of_one_table_that_were_computed_in_different_ways_are_pointed_out(translation: Path) -> None:
    assert "Take care" not in page_of(translation)

    def without_case(content: dict[str, Any]) -> None:
        bleu = content["metrics"]["bleu"]
        bleu["signature"] = bleu["signature"].replace("case:mixed", "case:lc")

    change(translation, "attention", without_case)
    assert "Take care: the scores were computed in 2 ways" in page_of(translation)
    page = results_page.page(translation / "results")
    assert page.count("- Signature of ") == 2
    assert "- Signature of LSTM with attention, 2 × 256: nrefs:1|case:lc|".replace("|", "\\|") in page


def test_a_table_of_translators_has_its_columns_and_no_others(translation: Path) -> None:
    page = page_of(translation)
    columns = re.findall(r'<th role="columnheader"[^>]*>(?:<abbr[^>]*>)?([^<]*)', page)
    assert columns[:7] == ["#", "System", "BLEU", "Against the best", "Published", "chrF2", "TER"]
    assert "bits/byte" not in page
    assert "higher is better" in page
    assert re.search(r"<strong>\d\d\.\d\d</strong>", page)
    assert "conditions differ): Scored on lower-cased spaCy tokens" in page


def test_scores_out_of_a_hundred_have_two_digits_however_small(translation: Path) -> None:
    change(translation, "no_attention", lambda content: content["metrics"]["bleu"].update(value=3.14159))
    assert "<strong>3.14</strong>" in page_of(translation)
    assert "**3.14**" in results_page.page(translation / "results")


def test_results_page_of_translators_carries_the_signature(translation: Path) -> None:
    text = results_page.page(translation / "results")
    assert "**multi30k-de-en, test\\_2016\\_flickr** (BLEU, higher is better)" in text
    names = re.findall(r"^\| ([^|]*?) \| \*\*", text, re.MULTILINE)
    assert names == ["Deep LSTM with attention, joint BPE", "LSTM with attention, 2 × 256", "GRU encoder-decoder"]
    assert re.search(
        r"^- Signature: nrefs:1\\\|case:mixed\\\|eff:no\\\|tok:13a\\\|smooth:exp\\\|version:[\d.]+$", text, re.MULTILINE
    )


def test_scores_by_length_are_drawn_with_the_number_of_sentences(translation: Path, pictures: None) -> None:
    page = page_of(translation)
    assert "<h3>BLEU by length</h3>" in page
    [label] = re.findall(r'aria-label="(BLEU by length of the source[^"]*)"', page)
    assert label.count("≥ 25 ") == 3
    buckets = board_of(translation).groups[0].systems[0].lengths
    assert sum(bucket.n for bucket in buckets) == SENTENCES
    assert all(f">({bucket.n})<" in page for bucket in buckets)
    assert [bucket.label for bucket in buckets] == ["≤ 8", "9–12", "13–16", "17–24", "≥ 25"]


def test_a_suite_of_one_length_has_no_picture_of_lengths(translation: Path, pictures: None) -> None:
    for path in (translation / "evaluations" / "demo").glob("*/lengths.json"):
        write_json(path, json.loads(path.read_text())[:1])
    assert "by length" not in page_of(translation)


def test_sentences_and_attention_are_shown(translation: Path) -> None:
    page = page_of(translation)
    assert page.count("<h4>Best: sentence ") == page.count("<h4>Middle: sentence ") == 9
    assert "<h4>Worst: sentence 11, chrF 0.0</h4>" in page
    assert "<i>empty</i>" in page
    assert page.count('class="attention"') == 4
    assert "Sentence 5: one of those it was least sure of" in page
    assert "No samples" not in page


def test_more_heat_maps_than_a_page_holds_are_counted(translation: Path) -> None:
    path = translation / "evaluations" / "demo" / "attention" / "attention.jsonl"
    small = {"source": ["a"], "target": ["b"], "weights": [[1.0]], "reason": "first"}
    wide = {"source": ["a"] * 121, "target": ["b"], "weights": [[0.0] * 121], "reason": "longest"}
    write_lines(path, [{"id": number, **(wide if number == 3 else small)} for number in range(10)])
    page = page_of(translation)
    assert page.count('class="attention"') == 2 + view.HEAT_MAPS_SHOWN
    assert "3 more sentences in attention.jsonl. 1 sentence too long to be drawn." in page


def test_hostile_sentences_and_tokens_are_escaped(translation: Path) -> None:
    folder = translation / "evaluations" / "demo" / "attention"
    example = {"rank": HOSTILE, "id": 0, "chrf": 1.0, "source": HOSTILE, "references": [HOSTILE], "hypothesis": HOSTILE}
    write_json(folder / "examples.json", [example])
    sentence = {"id": 0, "source": [HOSTILE], "target": [HOSTILE], "weights": [[1.0]], "reason": HOSTILE}
    write_lines(folder / "attention.jsonl", [sentence])
    change(translation, "attention", lambda content: content.update(test_set=f"{HOSTILE}/{HOSTILE}"))
    page = page_of(translation)
    for tag in ("<script", "<img", "</title></style>"):
        assert tag not in page
    assert page.count("&lt;script&gt;") > 8


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("lengths.json", "{}", r"lengths\.json: .*valid list"),
        ("lengths.json", '[{"low": "x", "high": 3, "n": 1, "scores": {}}]', r"lengths\.json: 0\.low: .*found 'x'"),
        ("examples.json", '[{"rank": "best"}]', r"examples\.json: 0\.id: Field required"),
        ("examples.json", "[", r"examples\.json:1: not JSON"),
        ("attention.jsonl", '{"id": 1}', r"attention\.jsonl:1: 'source' is None, a list of strings is expected"),
    ],
)
def test_damaged_files_of_a_translator_are_named_with_their_place(
    translation: Path, file: str, text: str, message: str
) -> None:
    (translation / "evaluations" / "demo" / "attention" / file).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        page_of(translation)
    assert "\n" not in str(raised.value)


# What is missing is said


def test_missing_predictions_are_stated_for_the_system(suite: Path) -> None:
    (suite / "evaluations" / "demo" / "lstm" / "statistics.json").unlink()
    (suite / "evaluations" / "demo" / "lstm" / "samples.jsonl").unlink()
    page = page_of(suite)
    assert "Predictions are missing (no statistics.json)" in page
    assert "No samples (samples.jsonl)." in page
    assert page.count(">incomplete<") == 1


def test_a_system_without_the_primary_metric_stands_last_with_the_reason(suite: Path) -> None:
    change(suite, "dilated", lambda content: content["metrics"].pop("nats_per_char"))
    board = board_of(suite)
    assert board.groups[0].systems[-1].result.recipe == "dilated"
    assert board.groups[0].standing(board.groups[0].systems[0]) == "best"
    assert "the results hold perplexity, bits_per_byte, not nats_per_char" in board.unscored["dilated"]
    assert "no score" in page_of(suite)


def test_recipes_without_results_are_named(suite: Path) -> None:
    (suite / "results" / "demo" / "lstm.json").unlink()
    unscored = board_of(suite, expected=("gru", "dilated")).unscored
    assert unscored == dict.fromkeys(["gru", "lstm"], "No results yet. Train, predict and evaluate it.")


def test_a_suite_where_nothing_has_a_score_still_gives_a_page(suite: Path) -> None:
    for recipe in order(suite):
        change(suite, recipe, lambda content: content.update(metrics={}))
    page = page_of(suite)
    assert "No system has a score yet." in page
    assert page.count("no metric at all") == 10  # in the list and with each system


def test_an_empty_suite_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "results" / "demo").mkdir(parents=True)
    with pytest.raises(UserError, match=r"results/demo: no results; evaluate the recipes of suite 'demo' first$"):
        page_of(tmp_path)


def test_an_unknown_suite_names_the_nearest(suite: Path) -> None:
    with pytest.raises(UserError, match=r"no results of a suite 'dmeo'; did you mean 'demo'\? \(allowed: demo\)"):
        build("dmeo", suite / "results" / "dmeo", suite / "evaluations" / "dmeo", suite / "reports")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results/demo/lstm.json", '{"recipe":\n', r"lstm\.json:2: not JSON"),
        ("results/demo/lstm.json", '{"recipe": "lstm"}', r"lstm\.json: task: Field required"),
        ("evaluations/demo/lstm/history.jsonl", "{}\n7\n", r"history\.jsonl:2: found int, a JSON object is expected"),
        (
            "evaluations/demo/lstm/samples.jsonl",
            '{"text": 1}\n',
            r"samples\.jsonl:1: 'text' is 1, a string is expected",
        ),
        ("evaluations/demo/lstm/statistics.json", '{"m": {"values": [[1, 2], [3]]}}', r"statistics\.json: .*again$"),
        (
            "evaluations/demo/lstm/statistics.json",
            '{"m": {"numerator": []}}',
            r"statistics\.json: .*evaluate lstm again$",
        ),
        ("evaluations/demo/lstm/statistics.json", '{"m": {"values": [1]}}', r"statistics\.json: .*again$"),
        ("evaluations/demo/lstm/statistics.json", "[]", r"statistics\.json: \{metric: \{values, conditions\}\}"),
    ],
)
def test_damaged_files_are_named_with_their_place(suite: Path, file: str, text: str, message: str) -> None:
    (suite / file).write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        page_of(suite)
    assert "\n" not in str(raised.value)


def test_a_results_file_under_another_name_is_refused(suite: Path) -> None:
    change(suite, "lstm", lambda content: content.update(recipe="gru"))
    with pytest.raises(UserError, match=r"lstm\.json: recipe: found 'gru', the file's name says 'lstm'"):
        page_of(suite)


# The file


@pytest.mark.pipeline
def test_the_same_inputs_give_the_same_bytes_in_any_process(suite: Path) -> None:
    """DVC compares bytes: a date, a random identifier or the order of a set would make every report new."""
    code = (
        "import sys, pathlib; from unroll.report.build import build\n"
        "root = pathlib.Path(sys.argv[1])\n"
        "build('demo', root / 'results/demo', root / 'evaluations/demo', root / sys.argv[2])"
    )
    contents = []
    for seed in ("1", "2"):
        command = [sys.executable, "-c", code, str(suite), f"report-{seed}"]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONHASHSEED": seed})
        contents.append([path.read_bytes() for path in sorted((suite / f"report-{seed}").iterdir())])
    assert len(contents[0]) == 3
    assert contents[0] == contents[1]


def test_the_page_names_nothing_outside_itself(suite: Path, pictures: None) -> None:
    page = page_of(suite)
    assert re.findall(r"https?://[^\"' ]*", page.replace("http://www.w3.org/2000/svg", "")) == []
    assert re.findall(r"(?:src|href|action|data|poster)=\"(?!#|data:,)[^\"]*", page) == []
    assert re.findall(r"@import|url\((?!#)", page) == []


def test_the_policy_allows_our_style_sheet_and_nothing_else(suite: Path, pictures: None) -> None:
    page = page_of(suite)
    [style] = re.findall(r"<style>(.*?)</style>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    [policy] = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy.replace("&#39;", "'").split("; ") == [
        "default-src 'none'",
        f"style-src 'sha256-{digest}'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
    ]
    assert " style=" not in page  # the policy would drop it without a word


def test_hostile_text_is_escaped_wherever_it_comes_in(suite: Path, pictures: None) -> None:
    def poison(content: dict[str, Any]) -> None:
        content |= {"title": HOSTILE, "dataset": HOSTILE, "split": HOSTILE, "commit": HOSTILE, "data_hash": HOSTILE}
        content |= {"model": {"name": HOSTILE}, "task": HOSTILE, "configuration": {HOSTILE: [HOSTILE]}}
        content["reference"] |= {"note": HOSTILE, "source": HOSTILE}
        content["cost"]["device"] = HOSTILE
        content["metrics"]["nats_per_char"] |= {"unit": HOSTILE, "signature": HOSTILE}

    change(suite, "lstm", poison)
    sample = {"temperature": HOSTILE, "top_k": HOSTILE, "prompt": HOSTILE, "text": HOSTILE}
    write_lines(suite / "evaluations" / "demo" / "lstm" / "samples.jsonl", [sample])
    page = page_of(suite)
    for tag in ("<script", "<img", "</title></style>"):
        assert tag not in page
    assert page.count("&lt;script&gt;") > 15
    results_page_text = results_page.page(suite / "results")
    for text in ((suite / "reports/demo/leaderboard.md").read_text(), results_page_text):
        assert "<script" not in text
        assert "<img" not in text


def test_text_that_breaks_terminals_or_encodings_is_made_harmless(suite: Path) -> None:
    path = suite / "evaluations" / "demo" / "lstm" / "samples.jsonl"
    path.write_text('{"temperature": 1, "text": "a\\u0000b\\u001b[31m\\ud800\\u202eevil\\r\\nשלום"}\n')
    page = page_of(suite)
    assert "a\ufffdb\ufffd[31m\ufffd\ufffdevil\nשלום" in page


def test_a_markdown_cell_cannot_break_its_table() -> None:
    assert tables.escape("a|b\nc `d` <e> [f](g) *h*") == "a\\|b c \\`d\\` &lt;e&gt; \\[f\\](g) \\*h\\*"


# What the page shows


def test_a_published_number_under_other_conditions_has_a_dagger_and_a_note(suite: Path) -> None:
    page = page_of(suite)
    assert page.count('aria-label="Note 1">†1</a>') == 2  # one note for the two systems that share it
    assert "nanoGPT, README (conditions differ): Trained on an A100" in page
    assert 'aria-label="Note 2">2</a>' in page
    assert "computed independently on the same split (same conditions)" in page


def test_a_published_number_of_another_metric_says_so(suite: Path) -> None:
    change(suite, "lstm", lambda content: content["reference"].update(metric="bits_per_byte", value=2.12))
    assert view.published(board_of(suite).groups[0].systems[1].result) == "2.12 bits per byte"
    assert '<span class="interval">bits per byte</span>' in page_of(suite)


def test_several_seeds_show_mean_and_deviation(suite: Path) -> None:
    page = page_of(suite)
    assert re.search(r'>3 <span class="interval">1\.49\d\d ± 0\.0020, best of 3 1\.49\d\d<', page)
    assert "Value, interval and\ntest are the first seed" in page


def test_each_system_unfolds_to_configuration_signature_commit_and_data(suite: Path) -> None:
    page = page_of(suite)
    for fact in ("train.optimizer.name", "adamw", "blocks:113|bootstrap:2000|seed:1|v:1", "0123456789ab", "9f" * 32):
        assert fact in page
    assert "not readable" in page  # energy


def test_energy_has_a_column_only_where_it_was_measured(suite: Path) -> None:
    assert ">Energy</th>" not in page_of(suite)
    change(suite, "lstm", lambda content: content["cost"].update(energy_joules=123_456.0))
    page = page_of(suite)
    assert ">Energy</th>" in page
    assert "123 kJ" in page


def test_long_and_many_samples_are_cut_and_counted(suite: Path) -> None:
    lines = [{"temperature": 0.1 * number, "text": "x" * 5000} for number in range(20)]
    write_lines(suite / "evaluations" / "demo" / "lstm" / "samples.jsonl", lines)
    page = page_of(suite)
    assert "8 more samples in samples.jsonl." in page
    assert "x" * 1501 not in page


def test_pictures_have_labels_units_and_words(suite: Path, pictures: None) -> None:
    page = page_of(suite)
    for label in ("loss (nats per predicted token)", "training step", "gradient norm before clipping", ">bits/byte<"):
        assert label in page
    assert re.search(r'aria-label="Loss over training steps; last values: Dilated convolutions 1\.\d+', page)
    assert "Without a curve: Kneser-Ney 6-gram; Markov chain (bigram)." in page


def test_the_words_below_the_losses_name_validation_only_where_it_is_drawn(tmp_path: Path, pictures: None) -> None:
    write_system(tmp_path, "demo", "tiny-shakespeare", "lstm", 0)
    assert "Thick with marks: validation. Thin: training" in page_of(tmp_path)
    path = tmp_path / "evaluations" / "demo" / "lstm" / "history.jsonl"
    path.write_text(path.read_text().replace("validation/loss", "validation/minus_cider"))
    page = page_of(tmp_path)
    assert "Thin: training, as logged." in page
    assert "Thick with marks" not in page


def test_a_counting_suite_has_no_curves(tmp_path: Path, pictures: None) -> None:
    write_system(tmp_path, "demo", "tiny-shakespeare", "bigram", 0)
    page = page_of(tmp_path)
    assert "<h3>Bits per byte</h3>" in page
    assert "<h3>Loss</h3>" not in page
    assert "<h3>Gradient norm</h3>" not in page


def test_a_diverged_run_is_drawn_as_far_as_it_went(suite: Path, pictures: None) -> None:
    path = suite / "evaluations" / "demo" / "lstm" / "history.jsonl"
    path.write_text(
        '{"step": 1, "train/loss": 3.0, "train/gradient_norm": 0.0}\n'
        '{"step": 2, "train/loss": NaN, "train/gradient_norm": "inf"}\n'
        '{"step": 3, "train/loss": "inf", "validation/loss": null}\n'
        '{"step": 4}\n'
    )
    history = board_of(suite).groups[0].systems[1].history
    [(steps, values)] = plots.curves(history, plots.TRAIN_LOSS)
    assert (steps.tolist(), values.tolist()) == ([1.0], [3.0])
    assert plots.curves(history, plots.VALIDATION_LOSS) == []
    assert "<h3>Loss</h3>" in page_of(suite)


def test_curves_keep_seeds_apart_and_steps_in_order() -> None:
    lines = [{"step": 2, "seed": 1, "train/loss": 2.0}, {"step": 1, "seed": 2, "train/loss": 9.0}]
    lines.append({"step": 1, "seed": 1, "train/loss": 3.0})
    drawn = plots.curves(lines, plots.TRAIN_LOSS)
    assert [np.stack(curve).tolist() for curve in drawn] == [[[1.0, 2.0], [3.0, 2.0]], [[1.0], [9.0]]]


def test_a_dollar_sign_in_a_title_is_no_formula(suite: Path, pictures: None) -> None:
    change(suite, "lstm", lambda content: content.update(title=r"$\frac{ $broken"))
    assert page_of(suite).count(r"$\frac{ $broken") > 5


def test_more_systems_than_colours_are_all_shown(tmp_path: Path, pictures: None) -> None:
    for number in range(10):
        write_system(tmp_path, "demo", "tiny-shakespeare", "lstm", number, name=f"lstm-{number}")
    board = board_of(tmp_path)
    assert len(board.groups[0].p_values) == 45
    assert html(board).count('class="system"') == 10


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "–"), (0, "0"), (0.5, "0.500"), (7, "7"), (412_345, "412 k"), (999_950, "1.00 M"), (3_214_567, "3.21 M"),
     (41_300.0, "41.3 k"), (1.93e10, "19.3 G"), (float("inf"), "–")],
)  # fmt: skip
def test_large_numbers_read_in_three_digits(value: float | None, text: str) -> None:
    assert formatting.scaled(value) == text


def test_scores_of_a_column_have_as_many_digits_as_tell_them_apart() -> None:
    assert formatting.decimals([1.4697, 88.0]) == 4
    assert formatting.decimals([65.8, 141.2]) == 2
    assert formatting.decimals([141.2, float("inf")]) == 1
    assert formatting.fixed(-1234.5, 1) == "−1,234.5"
    assert [formatting.fixed(value, 4) for value in (3.1e-5, 0.0006, 0.0, 0.25)] == [
        "3.1e−05",
        "0.0006",
        "0.0000",
        "0.2500",
    ]
    assert formatting.interval(1.4, float("inf"), 2) == "[1.40, ∞]"
    assert formatting.interval(None, None, 2) == ""
    assert (formatting.minutes(0.01), formatting.minutes(38.44), formatting.minutes(None)) == ("< 0.1", "38.4", "–")


# docs/results.md and the README


@pytest.fixture
def project(suite: Path) -> Path:
    (suite / "README.md").write_text(f"# unroll\n\n{results_page.BEGIN}\nold\n{results_page.END}\n\nEnd.\n")
    return suite


def test_results_page_has_our_number_the_published_one_and_what_it_took(project: Path) -> None:
    results_page.write(project)
    text = (project / "docs" / "results.md").read_text()
    [line] = [line for line in text.splitlines() if line.startswith("| LSTM")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert re.fullmatch(r"\*\*1\.49\d\d\*\* \\\[1\.4\d+, 1\.5\d+\\\]", cells[1])
    assert cells[2] == "1.4697 †"
    assert cells[4:] == ["0123456789ab", "38.4", "3.21 M", "41.3 k"]
    assert "LSTM, 2 × 512, tied embeddings: nanoGPT, README (conditions differ)" in text


def test_results_page_holds_every_suite(project: Path) -> None:
    write_suite(project, suite="cpu")
    results_page.write(project)
    text = (project / "docs" / "results.md").read_text()
    assert re.findall(r"^## .*", text, re.MULTILINE) == ["## Suite cpu", "## Suite demo"]


def test_only_the_part_between_the_markers_of_the_readme_changes(project: Path) -> None:
    results_page.write(project)
    once = (project / "README.md").read_text()
    assert once.startswith(f"# unroll\n\n{results_page.BEGIN}\n")
    assert once.endswith(f"{results_page.END}\n\nEnd.\n")
    assert "old" not in once
    assert "Kneser-Ney 6-gram" in once
    results_page.write(project)
    assert (project / "README.md").read_text() == once


def test_checking_names_the_page_that_is_out_of_date_and_writes_nothing(project: Path) -> None:
    with pytest.raises(UserError, match=r"docs/results\.md: differs from what .*results says"):
        results_page.write(project, check=True)
    assert not (project / "docs").exists()
    results_page.write(project)
    results_page.write(project, check=True)
    (project / "README.md").write_text((project / "README.md").read_text().replace("1.49", "1.39"))
    with pytest.raises(UserError, match=r"README\.md: differs"):
        results_page.write(project, check=True)


def test_a_readme_without_markers_is_refused(project: Path) -> None:
    (project / "README.md").write_text("# unroll\n")
    with pytest.raises(UserError, match=r"README\.md: the lines <!-- results:begin --> and <!-- results:end -->"):
        results_page.write(project)


def test_no_results_at_all_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no results of any suite"):
        results_page.page(tmp_path / "results")
