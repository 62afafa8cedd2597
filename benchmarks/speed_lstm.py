"""Speed of LSTM language models: ours against a plain PyTorch loop and against the machine's limit, as a table.

    python benchmarks/speed_lstm.py                  some minutes
    python benchmarks/speed_lstm.py --quick          a minute or two
    python benchmarks/speed_lstm.py --words wiki.train.txt.gz

Two models: characters (2 layers of 512, batch 64 x 128, AdamW) and words (2 layers of 200, untied, batch 20 x 35, SGD).
The words are those of `--words`, else of wikitext-2/train.txt.gz in UNROLL_MIRROR, else made up under Zipf's law.

The plain loop trains the way pytorch/examples `word_language_model` does: float32, nn.Embedding, nn.LSTM, nn.Linear,
CrossEntropyLoss, clip_grad_norm_; no dropout, and one of the LSTM's two biases frozen, so that the sum learns as fast
as our single one. "plain, memory kept" is the same after `unroll.memory.keep_freed_memory()`. Ours is
`models/recurrent_lm.py`, stepped the way the training loop does it. All start from the same weights and read the same
tokens in the same order; the loss is the mean over the last quarter of the steps.

The limit is the rate of a 2048^3 bfloat16 matrix product divided by the operations of a token, 6 for each weight in a
matrix product. Every variant has a process of its own; they take turns, some steps each, and a ratio is the median over
the turns of the ratio within a turn, so that a busy machine moves all of them alike.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import multiprocessing
import os
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from unroll.config import Optimizer
from unroll.memory import keep_freed_memory
from unroll.models.recurrent_lm import Config, Model
from unroll.training.optimizers import OptimizerPolicy

ROOT = Path(__file__).parent
RESULT = ROOT / "results" / "speed_lstm.json"
CHARACTERS = ROOT.parent / "data" / "embedded" / "tiny-shakespeare" / "input.txt"
GEMM = "bfloat16 matrix product"
GEMM_SIZE = 2048


@dataclass(frozen=True)
class Workload:
    """A model and how it is trained; each variant takes `steps` steps in a turn."""

    name: str
    vocabulary: int
    width: int
    batch: int
    window: int
    optimizer: str
    learning_rate: float
    clip: float
    steps: int
    cutoffs: tuple[int, ...] = ()
    layers: int = 2

    @property
    def flop_per_token(self) -> int:
        return 6 * (self.layers * 4 * self.width * 2 * self.width + self.width * self.vocabulary)

    @property
    def variants(self) -> list[str]:
        ours = ["ours, float32", "ours, bfloat16"] + ["ours, bfloat16, adaptive softmax"] * bool(self.cutoffs)
        return [GEMM, "plain", "plain, memory kept", *ours]


CHARACTER_MODEL = Workload("characters, 2x512", 65, 512, 64, 128, "adamw", 1e-3, 1.0, 3)
WORD_MODEL = Workload("words, 2x200", 33_278, 200, 20, 35, "sgd", 5.0, 0.25, 10, (2_000, 10_000))


# --- tokens -----------------------------------------------------------------------------------------------------------


def read_characters() -> tuple[np.ndarray, str]:
    text = CHARACTERS.read_text(encoding="utf-8")
    number = {character: index for index, character in enumerate(sorted(set(text)))}
    return np.array([number[character] for character in text]), "tiny-shakespeare"


def read_words(path: Path | None) -> tuple[np.ndarray, str]:
    """Word numbers in order of falling frequency, and what they are."""
    mirror = os.environ.get("UNROLL_MIRROR")
    if path is None and mirror and (Path(mirror) / "wikitext-2" / "train.txt.gz").exists():
        path = Path(mirror) / "wikitext-2" / "train.txt.gz"
    if path is None:
        ranks = 1 / np.arange(1, WORD_MODEL.vocabulary + 1)
        return np.random.default_rng(0).choice(len(ranks), 500_000, p=ranks / ranks.sum()), "made-up words"
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        words = [word for line in file for word in (*line.split(), "<eos>")]
    number = {word: index for index, (word, _) in enumerate(Counter(words).most_common())}
    if len(number) > WORD_MODEL.vocabulary:
        raise SystemExit(f"{path}: {len(number)} different words, at most {WORD_MODEL.vocabulary} are allowed")
    return np.array([number[word] for word in words]), path.parent.name


def batches(tokens: np.ndarray, batch: int, window: int) -> Iterator[tuple[Tensor, Tensor]]:
    """(tokens, targets) [B,T], contiguous in each row, for ever."""
    length = len(tokens) // batch
    lanes = torch.from_numpy(tokens[: batch * length].reshape(batch, length))  # [B,length]
    while True:
        for start in range(0, length - window - 1, window):
            yield lanes[:, start : start + window], lanes[:, start + 1 : start + window + 1]


# --- the two ways to train --------------------------------------------------------------------------------------------


class Plain(nn.Module):
    """The model of pytorch/examples `word_language_model`, without its dropout."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.embed = nn.Embedding(work.vocabulary, work.width)
        self.lstm = nn.LSTM(work.width, work.width, work.layers)
        self.decoder = nn.Linear(work.width, work.vocabulary)
        nn.init.uniform_(self.embed.weight, -0.1, 0.1)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        for number in range(work.layers):  # of the two biases, which only act as a sum, one learns: as in ours
            second = getattr(self.lstm, f"bias_hh_l{number}")
            nn.init.zeros_(second.requires_grad_(False))


def plain_step(work: Workload) -> Callable[[Tensor, Tensor], float]:
    torch.manual_seed(0)
    model, criterion = Plain(work), nn.CrossEntropyLoss()
    adamw = torch.optim.AdamW(model.parameters(), work.learning_rate) if work.optimizer == "adamw" else None
    hidden: list[Tensor] = []

    def step(tokens: Tensor, targets: Tensor) -> float:
        tokens, targets = tokens.T, targets.T  # [T,B]
        model.zero_grad()
        outputs, state = model.lstm(model.embed(tokens), tuple(hidden) or None)  # [T,B,H]
        hidden[:] = [value.detach() for value in state]
        loss = criterion(model.decoder(outputs).view(-1, work.vocabulary), targets.reshape(-1))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), work.clip)
        if adamw is not None:
            adamw.step()
        else:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-work.learning_rate)
        return loss.item()

    return step


def our_model(work: Workload, adaptive: bool) -> Model:
    """Ours, with the plain model's weights."""
    torch.manual_seed(0)
    plain = Plain(work)
    config = Config(layers=work.layers, width=work.width, cutoffs=list(work.cutoffs) if adaptive else [])
    model = Model(config, work.vocabulary)
    with torch.no_grad():
        model.embed.weight.copy_(plain.embed.weight)
        for number, layer in enumerate(model.layers):
            of_layer = {name.removesuffix(f"_l{number}"): value for name, value in plain.lstm.named_parameters()}
            layer.weight_input.copy_(of_layer["weight_ih"])
            layer.weight_hidden.copy_(of_layer["weight_hh"])
            layer.bias.copy_(of_layer["bias_ih"] + of_layer["bias_hh"])
        if not adaptive:
            model.output.weight.copy_(plain.decoder.weight)
    return model


def our_step(work: Workload, bfloat16: bool, adaptive: bool) -> Callable[[Tensor, Tensor], float]:
    model = our_model(work, adaptive)
    optimizer = Optimizer(name=work.optimizer, learning_rate=work.learning_rate, clip=work.clip)
    policy = OptimizerPolicy(optimizer, model, 1)
    state = model.initial_state(work.batch)

    def step(tokens: Tensor, targets: Tensor) -> float:
        nonlocal state
        policy.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16) if bfloat16 else nullcontext():
            output = model(tokens, state)
            total = model.output.total_log_loss(output.hidden.flatten(0, 1), targets.flatten())
        (total / targets.numel()).backward()
        state = {name: value.detach() for name, value in output.state.items()}
        loss = total.item() / targets.numel()
        if not math.isfinite(loss) or not math.isfinite(float(policy.clip())):
            raise SystemExit(f"the loss or the gradient is not finite: {loss}")
        policy.step(0)
        return loss

    return step


def product_step() -> Callable[[Tensor, Tensor], float]:
    left, right = torch.randn(2, GEMM_SIZE, GEMM_SIZE).bfloat16()
    out = torch.empty_like(left)

    def step(tokens: Tensor, targets: Tensor) -> float:
        torch.mm(left, right, out=out)
        return 0.0

    return step


# --- measuring --------------------------------------------------------------------------------------------------------


def serve(link: Connection, work: Workload, variant: str, tokens: np.ndarray, threads: int) -> None:
    """A variant's process: for each number received take so many steps and answer with (seconds, losses)."""
    torch.set_num_threads(threads)
    if variant.startswith("ours") or variant == "plain, memory kept":
        keep_freed_memory()
    if variant == GEMM:
        step = product_step()
    elif variant.startswith("plain"):
        step = plain_step(work)
    else:
        step = our_step(work, "bfloat16" in variant, "adaptive" in variant)
    source = batches(tokens, work.batch, work.window)
    while count := link.recv():
        seconds, losses = [], []
        for _ in range(count):
            batch = next(source)
            start = time.perf_counter()
            losses.append(step(*batch))
            seconds.append(time.perf_counter() - start)
        link.send((seconds, losses))


def take_turns(
    work: Workload, tokens: np.ndarray, turns: int, threads: int
) -> dict[str, tuple[list[float], list[float]]]:
    """For each variant the median seconds of a step in each turn, and all losses."""
    context = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for variant in work.variants:
        links[variant], theirs = context.Pipe()
        arguments = (theirs, work, variant, tokens, threads)
        processes.append(context.Process(target=serve, args=arguments, daemon=True))
        processes[-1].start()
    measured: dict[str, tuple[list[float], list[float]]] = {variant: ([], []) for variant in work.variants}
    for turn in range(turns + 1):
        for variant, link in links.items():
            link.send(work.steps)
            seconds, losses = link.recv()
            measured[variant][1].extend(losses)
            if turn:  # the first turn warms up
                measured[variant][0].append(statistics.median(seconds))
    for link, process in zip(links.values(), processes, strict=True):
        link.send(0)
        process.join()
    return measured


def table(work: Workload, measured: dict[str, tuple[list[float], list[float]]]) -> list[dict[str, Any]]:
    """A row for each variant."""
    plain, plain_losses = measured["plain"]
    products = measured[GEMM][0]
    count = work.batch * work.window
    limits = [2 * GEMM_SIZE**3 / seconds / work.flop_per_token for seconds in products]  # tokens/s in each turn
    rows: list[dict[str, Any]] = [{"variant": "limit", "tokens_per_second": statistics.median(limits)}]
    for variant, (seconds, losses) in measured.items():
        if variant == GEMM:
            continue
        row: dict[str, Any] = {"variant": variant, "milliseconds": 1e3 * statistics.median(seconds)}
        row["tokens_per_second"] = count / statistics.median(seconds)
        if "adaptive" not in variant:
            row["of_limit"] = statistics.median(count / s / limit for s, limit in zip(seconds, limits, strict=True))
        row["times_plain"] = statistics.median(p / s for p, s in zip(plain, seconds, strict=True))
        last = max(1, len(losses) // 4)
        row["loss"] = statistics.fmean(losses[-last:])
        row["loss_over_plain"] = row["loss"] / statistics.fmean(plain_losses[-last:])
        rows.append(row)
    return rows


def show(work: Workload, rows: list[dict[str, Any]], gigaflops: float, tokens: int) -> None:
    print(f"\n{work.name}: batch {work.batch} x {work.window}, vocabulary {work.vocabulary:,}, {work.optimizer},")
    print(f"{work.flop_per_token / 1e6:.1f} MFLOP a token, {GEMM} {gigaflops:.0f} GFLOP/s, {tokens:,} tokens read\n")
    print("| variant | ms/step | tokens/s | of the limit | times plain | loss | loss / plain |")
    print("|---|---|---|---|---|---|---|")
    formats = {"milliseconds": ",.1f", "tokens_per_second": ",.0f", "of_limit": ".0%", "times_plain": ".2f"}
    formats |= {"loss": ".4f", "loss_over_plain": ".4f"}
    for row in rows:
        cells = [format(row[key], form) if key in row else "" for key, form in formats.items()]
        print("| " + " | ".join([row["variant"], *cells]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few steps: shows that it works, not how fast")
    parser.add_argument("--words", type=Path, help="text to read words from, plain or .gz")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    turns = 2 if options.quick else 8
    result: dict[str, Any] = {
        "torch": torch.__version__,
        "processor": platform.processor() or platform.machine(),
        "threads": options.threads,
        "load_before": os.getloadavg()[0],
        "quick": options.quick,
        "workloads": [],
    }
    for work, (tokens, text) in ((CHARACTER_MODEL, read_characters()), (WORD_MODEL, read_words(options.words))):
        measured = take_turns(work, tokens, turns, options.threads)
        rows = table(work, measured)
        gigaflops = 2 * GEMM_SIZE**3 / statistics.median(measured[GEMM][0]) / 1e9
        trained = (turns + 1) * work.steps * work.batch * work.window
        show(work, rows, gigaflops, trained)
        entry = {**asdict(work), "text": text, "flop_per_token": work.flop_per_token, "gigaflops": gigaflops}
        result["workloads"].append({**entry, "trained_tokens": trained, "rows": rows})
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
