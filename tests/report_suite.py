"""A made-up suite on disk: results and evaluation files as the evaluate stage writes them, for tests of the report."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

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
