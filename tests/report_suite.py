"""Made-up suites on disk: results and evaluation files as the evaluate stage writes them, for tests of the report."""

import importlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from unroll.metrics._breakdown import by_length, examples
from unroll.metrics._predictions import Sentence

HOSTILE = "</title></style><script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"
TITLES = {
    "bigram": "Markov chain (bigram)",
    "kneser-ney-6": "Kneser-Ney 6-gram",
    "feedforward": "Feed-forward network (Bengio 2003)",
    "lstm": "LSTM, 2 × 512, tied embeddings",
    "dilated": "Dilated convolutions",
}
MEANS = {"bigram": 2.4839, "kneser-ney-6": 1.5385, "feedforward": 1.713, "lstm": 1.4897, "dilated": 1.4861}
BLOCKS = 113


def write_json(path: Path, value: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def write_lines(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_suite(root: Path, suite: str = "demo", dataset: str = "tiny-shakespeare") -> Path:
    """Five systems on one test set under `root/results` and `root/evaluations`; the same bytes every time."""
    for index, recipe in enumerate(TITLES):
        write_system(root, suite, dataset, recipe, index)
    return root


def write_system(root: Path, suite: str, dataset: str, recipe: str, index: int, name: str = "") -> None:
    """One of the systems, under its own name or another."""
    generator = np.random.default_rng(index)
    counting = recipe in ("bigram", "kneser-ney-6")
    text = np.random.default_rng(99).normal(0, 0.06, BLOCKS)  # how hard each block is, for all systems
    nats = (MEANS[recipe] + text + generator.normal(0, 0.015, BLOCKS)) * 1000
    content = results(recipe, dataset, nats, counting) | {"recipe": name or recipe}
    write_json(root / "results" / suite / f"{name or recipe}.json", content)
    folder = root / "evaluations" / suite / (name or recipe)
    in_bits = nats / math.log(2)
    write_json(folder / "statistics.json", {"nats_per_char": statistics(nats), "bits_per_byte": statistics(in_bits)})
    if not counting:
        write_lines(folder / "history.jsonl", history(MEANS[recipe], generator))
    write_lines(folder / "samples.jsonl", samples(recipe))


def statistics(losses: np.ndarray) -> dict[str, Any]:
    """Losses over blocks of a thousand characters."""
    return {"values": [[loss, 1000.0] for loss in losses.tolist()], "conditions": f"{BLOCKS} blocks of 1000"}


def results(recipe: str, dataset: str, nats: np.ndarray, counting: bool) -> dict[str, Any]:
    mean = float(nats.mean() / 1000)
    half = float(2 * nats.std() / 1000 / math.sqrt(BLOCKS))
    several = recipe == "lstm"
    signature = f"blocks:{BLOCKS}|bootstrap:2000|seed:1|v:1"

    def metric(value: float, half: float, unit: str) -> dict[str, Any]:
        seeds = (
            {"per_seed": [value, value - 0.002, value + 0.002], "mean": value, "deviation": 0.002} if several else {}
        )
        interval = {"value": value, "low": value - half, "high": value + half}
        return {**interval, "n": BLOCKS, "unit": unit, "signature": signature, **seeds}

    return {
        "recipe": recipe,
        "title": TITLES[recipe],
        "task": "language_modeling",
        "dataset": dataset,
        "model": "ngram" if counting else "recurrent_lm",
        "split": "validation",
        "seeds": [1, 2, 3] if several else [1],
        "commit": "0123456789ab",
        "primary": "nats_per_char",
        "metrics": {
            "nats_per_char": metric(mean, half, "nats/char"),
            "perplexity": metric(math.exp(mean), half * math.exp(mean), "perplexity"),
            "bits_per_byte": metric(mean / math.log(2), half / math.log(2), "bits/byte"),
        },
        "reference": reference(recipe),
        "cost": cost(counting),
        "data_hash": "9f" * 32,
        "configuration": {
            "model": {"name": "ngram", "order": 6} if counting else {"cell": "lstm", "width": 512, "layers": 2},
            "train": {"counting": True} if counting else {"batch": 64, "optimizer": {"name": "adamw", "clip": 1.0}},
        },
    }


def reference(recipe: str) -> dict[str, Any] | None:
    if recipe == "kneser-ney-6":
        source = "computed independently on the same split"
        return {"metric": "nats_per_char", "value": 1.5385, "source": source, "same_conditions": True, "note": ""}
    if recipe in ("lstm", "dilated"):
        note = "Trained on an A100; averages random blocks of 256 characters, so its contexts are shorter."
        source = "nanoGPT, README"
        return {"metric": "nats_per_char", "value": 1.4697, "source": source, "same_conditions": False, "note": note}
    return None


def cost(counting: bool) -> dict[str, Any]:
    return {
        "minutes": 0.03 if counting else 38.4,
        "tokens_per_second": 1_250_000.0 if counting else 41_300.0,
        "parameters": 412_345 if counting else 3_214_567,
        "flops_per_token": None if counting else 19_300_000.0,
        "peak_memory_mb": 812.5,
        "energy_joules": None,
        "device": "2 CPU cores",
    }


def history(final: float, generator: np.random.Generator) -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(10, 5001, 10):
        loss = final + 2.7 * math.exp(-step / 260) + 0.35 * math.exp(-step / 1800)
        line = {"step": step, "time": 1.7e9 + step, "train/loss": loss - 0.05 + float(generator.normal(0, 0.025))}
        line["train/gradient_norm"] = float(np.exp(generator.normal(-0.9 + 1.4 * math.exp(-step / 400), 0.18)))
        if step % 250 == 0:
            line["validation/loss"] = loss
        lines.append(line)
    return lines


def samples(recipe: str) -> list[dict[str, Any]]:
    texts = {
        0.5: "O, let me see the strength of thy desire,\nAnd let the people hear the king.\n\nROMEO:\nI will.",
        0.8: "What say you, sir? the duke hath spoke his mind,\nAnd all the rest are gone to bid him come.",
        1.0: "Ay, marl'd upon thy breast: be swift as owls,\nFor I'll not quake; the morrow's in my tooth!",
    }
    rows = [{"temperature": t, "top_k": None, "top_p": None, "prompt": "ROMEO:\n", "text": s} for t, s in texts.items()]
    return [*rows, {"temperature": 1.0, "top_k": 40, "top_p": 0.95, "prompt": "", "text": f"{recipe}: " + texts[0.8]}]


# A suite of translators: sentences, BLEU with sacrebleu's signature, attention

TRANSLATORS = {
    "attention": ("LSTM with attention, 2 × 256", "multi30k-de-en", 0.16),
    "attention_bpe": ("Deep LSTM with attention, joint BPE", "multi30k-de-en-bpe", 0.14),
    "no_attention": ("GRU encoder-decoder", "multi30k-de-en", 0.45),
}
SENTENCES = 200
TEST_SET = "multi30k-de-en/test_2016_flickr"
TEXTS = (
    "Ein Hund rennt über die grüne Wiese und zwei Männer in roten Hemden sehen ihm dabei zu während es heute regnet "
    "vor dem kleinen Haus steht noch eine alte Frau mit ihrem Kind das gerade laut lacht",
    "A dog runs across the green meadow and two men wearing red shirts are watching it while rain falls today "
    "outside of that small house stands one old woman with her child who just laughs loudly now",
)
_GERMAN, _ENGLISH = (text.split() for text in TEXTS)


def write_translations(root: Path, suite: str = "cpu") -> Path:
    """Three translators on one test set, two of them with attention; the same bytes every time."""
    for index, recipe in enumerate(TRANSLATORS):
        write_translator(root, suite, recipe, index)
    return root


def translations(recipe: str, index: int) -> list[Sentence]:
    """Made-up sentences; hypotheses lose and confuse more words the longer the sentence is."""
    text, generator = np.random.default_rng(7), np.random.default_rng(index)
    sentences = []
    for number in range(SENTENCES):
        length = int(text.integers(3, 32))
        chosen = text.permutation(len(_GERMAN))[:length]
        source, reference = (" ".join(words[i] for i in chosen) + "." for words in (_GERMAN, _ENGLISH))
        noise = TRANSLATORS[recipe][2] * (0.4 + length / 25)
        kept = [_ENGLISH[i] if generator.random() > noise else str(generator.choice(_ENGLISH)) for i in chosen]
        hypothesis = "" if number == 11 else " ".join(kept) + "."
        sentences.append(Sentence(source, (reference,), hypothesis))
    return sentences


def write_translator(root: Path, suite: str, recipe: str, index: int) -> None:
    generator, (title, dataset, _) = np.random.default_rng(index), TRANSLATORS[recipe]
    sentences = translations(recipe, index)
    predictions = root / "predictions" / recipe / "seed-1"
    lines = [
        {"id": i, "source": s.source, "references": s.references, "hypothesis": s.hypothesis}
        for i, s in enumerate(sentences)
    ]
    write_lines(predictions / "translations.jsonl", lines)
    scores, found, options = {}, {}, {"samples": 200}
    for name in ("bleu", "chrf", "ter"):
        metric = importlib.import_module(f"unroll.metrics.{name}")
        scores[name] = metric.compute(predictions, options).to_json()
        found[name] = metric.statistics(predictions, options), metric.score
    note = "Scored on lower-cased spaCy tokens by torchtext's BLEU; ours is detokenised, sacrebleu 13a."
    content = {
        "recipe": recipe,
        "title": title,
        "task": "translation",
        "dataset": dataset,
        "model": {"name": "seq2seq"},
        "split": "test_2016_flickr",
        "test_set": TEST_SET,
        "seeds": [1],
        "commit": "0123456789ab",
        "primary": "bleu",
        "metrics": scores,
        "reference": {
            "metric": "bleu",
            "value": 20.61 if recipe == "no_attention" else 28.3,
            "source": "bentrevett/pytorch-seq2seq",
            "same_conditions": False,
            "note": note,
        },
        "cost": cost(counting=False),
        "data_hash": "8e" * 32,
        "configuration": {"model": {"cell": "lstm", "width": 256, "layers": 2}},
    }
    write_json(root / "results" / suite / f"{recipe}.json", content)
    folder = root / "evaluations" / suite / recipe
    statistics_of = {name: {"values": s.values.tolist(), "conditions": s.conditions} for name, (s, _) in found.items()}
    write_json(folder / "statistics.json", statistics_of)
    write_json(folder / "lengths.json", by_length(sentences, found))
    write_json(folder / "examples.json", examples(sentences))
    write_lines(folder / "history.jsonl", history(1.6 + 0.3 * index, generator))
    if recipe != "no_attention":
        write_lines(
            folder / "attention.jsonl", [attention(sentences[i], i, r) for i, r in ((0, "first"), (5, "worst"))]
        )


def attention(sentence: Sentence, number: int, reason: str) -> dict[str, Any]:
    """Nearly diagonal weights."""
    source, target = [*sentence.source.split(), "</s>"], [*sentence.hypothesis.split(), "</s>"]
    distance = np.subtract.outer(np.arange(len(target)) * len(source) / len(target), np.arange(len(source)))
    weights = np.exp(-np.abs(distance + np.sin(np.arange(len(target)))[:, None])) + 1e-4  # [T,S]
    rows = (weights / weights.sum(axis=1, keepdims=True)).tolist()
    return {"id": number, "source": source, "target": target, "weights": rows, "reason": reason}
