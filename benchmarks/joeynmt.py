"""Translation beside JoeyNMT, the same model on the same data: training speed, beam search speed, memory, BLEU.

    python benchmarks/joeynmt.py                       all of it, an hour on two cores
    python benchmarks/joeynmt.py --parts decoding      training and decoding speed, without the long training for BLEU
    python benchmarks/joeynmt.py --quick               shows that it works, not how fast

JoeyNMT (Kreutzer et al. 2019, arXiv:1907.12484) comes from the package index into an environment of its own, under
build/joeynmt. Both systems read the subwords of our prepared Multi30k de-en, which JoeyNMT gets as text with its
vocabulary, one word a subword; so data, vocabulary and batch tokens (rows x longest, padding included) are the same.
Both have a bi-directional LSTM of 256, an LSTM decoder of 256 with input feeding and bilinear attention, and one matrix
of 256-wide embeddings for source, target and output: `joeynmt/theirs.yaml`, `joeynmt/ours.yaml`.

Each system runs its own training loop in its own process and is timed from inside (`joeynmt/serve.py`). They take
turns, and a ratio is the median over the turns of the ratio within a turn, so that a busy machine moves both alike:
- training: real target tokens a second, EOS included, over everything the loop does but validation;
- peak memory: the largest resident size of the process up to the end of those turns;
- decoding: the test set with beam 5, ours in a process of its own as in stage `predict`. With `bleu`, by the models
  trained for it, with what they say; otherwise by models that have hardly been trained, all outputs cut or stretched to
  one length;
- bleu: each system trains alone for the same minutes, and is stopped ten times to validate, off the clock. The weights
  of the best validation translate the test set with beam 5; one code turns subwords into text and scores it against
  the raw references, lower case, sacrebleu's tokenisation 13a.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import sacrebleu
import yaml

from unroll.data.shards import SampleReader, load_manifest
from unroll.data.tokenizers import BpeTokenizer, load

HERE = Path(__file__).parent
ROOT = HERE.parent
PARTS = HERE / "joeynmt"
RESULT = HERE / "results" / "joeynmt.json"
DATASET = "multi30k-de-en"
TEST = "test_2016_flickr"
VERSION = "2.3.0"
SPECIALS = {"<unk>", "<pad>", "<s>", "</s>"}  # JoeyNMT's own
BEAM, DECODED_TOGETHER = 5, 64
FIXED_LENGTH = 15  # tokens, about the mean of the test set


# --- JoeyNMT's environment --------------------------------------------------------------------------------------------


def environment(folder: Path) -> Path:
    """The Python of an environment with JoeyNMT, made at the first call."""
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    requirements, constraints = PARTS / "requirements.txt", ROOT / "constraints.txt"
    wanted = f"joeynmt {VERSION}\n{requirements.read_text()}{constraints.read_text()}"
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"installing JoeyNMT {VERSION} into {folder}")
    subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
    install: list[str | Path] = [python, "-m", "pip", "install", "--quiet"]
    what: list[str | Path] = ["--constraint", constraints, "--requirement", requirements]
    plan = subprocess.run(
        [*install, "--dry-run", "--report", "-", *what], stdout=subprocess.PIPE, check=True, env=foreign_environ()
    )
    refuse_cuda([item["metadata"]["name"] for item in json.loads(plan.stdout)["install"]])
    for more in (what, ["--no-deps", f"joeynmt=={VERSION}"]):
        subprocess.run([*install, *more], check=True, env=foreign_environ())
    stamp.write_text(wanted)
    return python


def foreign_environ() -> dict[str, str]:
    """Our variables without the one that would mix our packages into another environment."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def refuse_cuda(packages: list[str]) -> None:
    """Gigabytes for a GPU are no part of a comparison on a CPU."""
    heavy = [name for name in packages if name.startswith(("nvidia", "triton", "torchvision"))]
    if heavy:
        sys.exit(f"pip would fetch {', '.join(heavy)}; name an index with the CPU's torch in PIP_EXTRA_INDEX_URL")


# --- the data as text -------------------------------------------------------------------------------------------------


def subwords(tokenizer: BpeTokenizer) -> list[str]:
    """The text of each token id, as the tokenizer writes it: one letter for each byte.

    Raises:
        SystemExit: a token that JoeyNMT would not read as one word of its own.
    """
    words = sorted(tokenizer.vocabulary, key=tokenizer.vocabulary.__getitem__)
    for word in words:
        if [word] != word.split() or [word] != word.splitlines() or word in SPECIALS:
            sys.exit(f"the token {word!r} cannot be written as a word among others")
    return words


def write_text(prepared: Path, split: str, words: list[str], path: Path, limit: int | None = None) -> None:
    """A split as `<path>.source` and `<path>.target`, a sentence a line, a blank between subwords.

    Raises:
        SystemExit: a sentence without a token, which JoeyNMT drops on one side without a word.
    """
    with path.with_suffix(".source").open("w") as sources, path.with_suffix(".target").open("w") as targets:
        for number, sample in zip(range(limit or sys.maxsize), samples(prepared, split), strict=False):
            for side, file in (("source", sources), ("target", targets)):
                if not len(sample[side]):
                    sys.exit(f"{prepared}: split {split}: sentence {number} has an empty {side}")
                file.write(" ".join(words[token] for token in sample[side]) + "\n")


def samples(prepared: Path, split: str) -> Iterator[dict[str, Any]]:
    reader = SampleReader(prepared, split)
    for shard, count in enumerate(reader.shard_counts):
        yield from (reader.sample(shard, index) for index in range(count))


def text_of(tokenizer: BpeTokenizer, sentences: list[list[str]]) -> list[str]:
    """Subwords back to sentences; JoeyNMT says <unk> where its beam came to nothing."""
    ids = [[tokenizer.vocabulary[word] for word in sentence if word not in SPECIALS] for sentence in sentences]
    return [tokenizer.decode(sentence) for sentence in ids]


# --- the two systems --------------------------------------------------------------------------------------------------


class System:
    """A system in a process of its own (`joeynmt/serve.py`)."""

    def __init__(self, name: str, command: list[Any], environ: dict[str, str], log: Path) -> None:
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, env=environ, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=ROOT
            )
        self.parameters = self._answer()["parameters"]

    def ask(self, do: str, **options: Any) -> dict[str, Any]:
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"do": do, **options}) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} ended before it was asked to: see {self.log}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin
        self.process.stdin.close()  # no more commands
        self.process.wait()


@contextmanager
def both(python: Path, options: argparse.Namespace, steps: int) -> Iterator[list[System]]:
    """JoeyNMT and ours, freshly initialised; `steps`: the updates that our learning rate's schedule reckons with."""
    work = options.work
    threads = {"OMP_NUM_THREADS": str(options.threads)}
    theirs = yaml.safe_load((PARTS / "theirs.yaml").read_text())
    theirs["model_dir"], theirs["random_seed"] = str(work / "theirs"), options.seed
    theirs["training"]["batch_size"] = options.batch_tokens
    theirs["data"] |= {name: str(work / file) for name, file in (("train", "train"), ("dev", "validation"))}
    theirs["data"]["test"] = str(work / "test")
    for side in ("src", "trg"):
        theirs["data"][side]["voc_file"] = str(work / "vocabulary.txt")
    (work / "theirs.yaml").write_text(yaml.safe_dump(theirs))
    ours = yaml.safe_load((PARTS / "ours.yaml").read_text())
    ours["train"] |= {"batch_tokens": options.batch_tokens, "steps": steps}
    (work / "ours.yaml").write_text(yaml.safe_dump(ours))
    with ExitStack() as stack:
        command = [python, PARTS / "theirs.py", work / "theirs.yaml", str(options.threads)]
        systems = [
            stack.enter_context(System("JoeyNMT", command, {**foreign_environ(), **threads}, work / "theirs.log"))
        ]
        command = [sys.executable, PARTS / "ours.py", work / "ours.yaml", str(options.threads)]
        command += [options.data, work / "ours", str(options.seed), str(options.sentences)]
        systems.append(stack.enter_context(System("ours", command, {**os.environ, **threads}, work / "ours.log")))
        yield systems


# --- measuring --------------------------------------------------------------------------------------------------------


def training_turns(systems: list[System], turns: int, updates: int) -> list[list[dict[str, Any]]]:
    """For each system its turns; the first one, which warms up, is left out."""
    measured: list[list[dict[str, Any]]] = [[] for _ in systems]
    for turn in range(turns + 1):
        for system, answers in zip(systems, measured, strict=True):
            answer = system.ask("train", updates=updates)
            say(f"training, turn {turn}: {system.name} {answer['target_tokens'] / answer['seconds']:,.0f} tokens/s")
            if turn:
                answers.append(answer)
    return measured


def decoding_turns(systems: list[System], turns: int, length: int | None) -> list[list[dict[str, Any]]]:
    """For each system its turns through the test set."""
    measured: list[list[dict[str, Any]]] = [[] for _ in systems]
    for turn in range(turns):
        for system, answers in zip(systems, measured, strict=True):
            answer = system.ask("translate", beam=BEAM, batch=DECODED_TOGETHER, length=length)
            lines = answer.pop("tokens")
            answers.append({**answer, "sentences": len(lines), "tokens": sum(map(len, lines))})
            say(f"decoding, turn {turn + 1}: {system.name} {len(lines) / answer['seconds']:,.1f} sentences/s")
    return measured


def train_for(system: System, minutes: float, validations: int) -> dict[str, Any]:
    """Train for so long, with pauses to validate, and take the best weights; gives what was done."""
    left, done = 60 * minutes, {"updates": 0, "target_tokens": 0, "seconds": 0.0, "seconds_validating": 0.0}
    for pause in range(validations, 0, -1):
        turn = system.ask("train", seconds=left / pause)
        validation = system.ask("validate")
        left -= turn["seconds"]
        done = {name: value + turn.get(name, 0) for name, value in done.items()}
        done["seconds_validating"] += validation["seconds"]
        say(f"bleu: {system.name} at update {done['updates']}, {left / 60:.1f} minutes left")
    return {**done, **system.ask("use_best")}


def score(system: System, tokenizer: BpeTokenizer, references: list[str]) -> dict[str, Any]:
    """BLEU of the test set as the system translates it now."""
    answer = system.ask("translate", beam=BEAM, batch=DECODED_TOGETHER, length=None)
    translations = text_of(tokenizer, answer["tokens"])
    metric = sacrebleu.BLEU(lowercase=True)
    bleu = metric.corpus_score(translations, [references])
    return {"bleu": bleu.score, "signature": str(metric.get_signature()), "examples": translations[:5]}


# --- the table --------------------------------------------------------------------------------------------------------


def rate(answers: list[dict[str, Any]], what: str) -> float:
    return statistics.median(answer[what] / answer["seconds"] for answer in answers)


def ratio(measured: list[list[dict[str, Any]]], what: str) -> float:
    """How many times their rate ours is: the median over the turns."""
    turns = zip(*measured, strict=True)
    return statistics.median((us[what] / us["seconds"]) / (them[what] / them["seconds"]) for them, us in turns)


def rows(result: dict[str, Any]) -> list[tuple[str, ...]]:
    """(what, JoeyNMT, ours, ours against JoeyNMT, goal) for all that was measured."""
    training, sizes = result["training"], result["parameters"]
    table: list[tuple[str, ...]] = [("parameters", f"{sizes[0]:,}", f"{sizes[1]:,}", f"{sizes[1] / sizes[0]:.2f}", "")]
    table.append(row("target tokens/s, training", training, "target_tokens", ",.0f", ">= 3"))
    full = [sum(a["target_tokens"] for a in answers) / sum(a["updates"] for a in answers) for answers in training]
    table.append(("target tokens an update", f"{full[0]:,.0f}", f"{full[1]:,.0f}", f"{full[1] / full[0]:.2f}", ""))
    peaks = [answers[-1]["peak_mb"] for answers in training]
    peak = f"{peaks[0]:,.0f}", f"{peaks[1]:,.0f}", f"{peaks[1] / peaks[0]:.2f}"
    table.append(("peak memory of training, MB", *peak, "<= 1"))
    if decoding := result.get("decoding"):
        table.append(row(f"sentences/s, beam {BEAM}", decoding, "sentences", ",.1f", ">= 4"))
        mean = [answers[-1]["tokens"] / answers[-1]["sentences"] for answers in decoding]
        table.append(("tokens an output", f"{mean[0]:.1f}", f"{mean[1]:.1f}", f"{mean[1] / mean[0]:.2f}", ""))
    if bleu := result.get("bleu"):
        points = [system["bleu"] for system in bleu]
        minutes = f"BLEU after {result['minutes']:g} minutes"
        table.append((minutes, f"{points[0]:.2f}", f"{points[1]:.2f}", f"{points[1] - points[0]:+.2f}", "> 0"))
        updates = [f"{system['updates']:,}" for system in bleu]
        table.append(("updates in these minutes", *updates, f"{bleu[1]['updates'] / bleu[0]['updates']:.2f}", ""))
    return table


def row(name: str, measured: list[list[dict[str, Any]]], what: str, form: str, goal: str) -> tuple[str, ...]:
    theirs, ours = (format(rate(answers, what), form) for answers in measured)
    return name, theirs, ours, f"{ratio(measured, what):.2f}", goal


def show(result: dict[str, Any]) -> None:
    print(f"Multi30k de-en, {result['vocabulary']:,} subwords, batches of {result['batch_tokens']:,} tokens,")
    turns = f"{result['turns']} turns of {result['updates']} updates"
    print(f"{result['threads']} thread(s), torch {result['torch']}, training speed over {turns}", end="")
    print(f"; decoding by {result['weights']}" if "weights" in result else "")
    print(f"\n| | JoeyNMT {VERSION} | ours | ours / JoeyNMT | goal |\n|---|---|---|---|---|")
    for cells in rows(result):
        print("| " + " | ".join(cells) + " |")
    if result.get("bleu"):
        print(f"\n{result['bleu'][0]['signature']}")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="*", choices=["decoding", "bleu"], default=["decoding", "bleu"],
                        help="beside training speed, which is always measured")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="short turns, few sentences, half a minute for BLEU")
    parser.add_argument("--turns", type=int, default=8, help="turns of training that count (decoding: a third)")
    parser.add_argument("--updates", type=int, default=20, help="updates in a turn")
    parser.add_argument("--sentences", type=int, default=1000, help="of the test set")
    parser.add_argument("--minutes", type=float, default=22.0, help="of training before BLEU")
    parser.add_argument("--validations", type=int, default=10, help="in these minutes")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "prepared" / DATASET)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "joeynmt")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    options.work, options.data = options.work.absolute(), options.data.absolute()
    if options.quick:
        options.turns, options.updates, options.sentences, options.minutes, options.validations = 2, 2, 32, 0.5, 2
    return options


def write_data(options: argparse.Namespace, words: list[str]) -> None:
    """Training, validation and test data and the vocabulary, as JoeyNMT reads them."""
    (options.work / "vocabulary.txt").write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    limits = {"train": None, "validation": 64 if options.quick else None, TEST: options.sentences}
    for (split, limit), name in zip(limits.items(), ("train", "validation", "test"), strict=True):
        write_text(options.data, split, words, options.work / name, limit)
    (options.work / "test.target").unlink()  # JoeyNMT would score against it


def measure(options: argparse.Namespace, python: Path, tokenizer: BpeTokenizer, result: dict[str, Any]) -> None:
    """Everything that was asked for, kept as soon as it is there."""
    turns = max(1, options.turns // 3)
    with both(python, options, steps=100_000) as systems:
        result["parameters"] = [system.parameters for system in systems]
        result["training"] = training_turns(systems, options.turns, options.updates)
        keep(result, options.out)
        if options.parts == ["decoding"]:
            result["weights"] = f"models hardly trained, {FIXED_LENGTH} tokens an output"
            result["decoding"] = decoding_turns(systems, turns, FIXED_LENGTH)
            keep(result, options.out)
    if "bleu" not in options.parts:
        return
    steps = max(1, round(60 * options.minutes * rate(result["training"][1], "updates")))
    references = [sample["target_text"] for sample in samples(options.data, TEST)][: options.sentences]
    with both(python, options, steps) as systems:
        trained = [train_for(system, options.minutes, options.validations) for system in systems]
        scores = [score(system, tokenizer, references) for system in systems]
        result["bleu"] = [{**done, **points} for done, points in zip(trained, scores, strict=True)]
        keep(result, options.out)
        if "decoding" in options.parts:
            result["weights"] = f"models trained for {options.minutes:g} minutes"
            result["decoding"] = decoding_turns(systems, turns, None)
            keep(result, options.out)


def keep(result: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    options = arguments()
    if not (options.data / "manifest.json").exists():
        subprocess.run([sys.executable, "-m", "unroll", "prepare", DATASET], cwd=ROOT, stdout=sys.stderr, check=True)
    tokenizer = load(options.data / "tokenizer.json")
    if not isinstance(tokenizer, BpeTokenizer) or not load_manifest(options.data).get("joint"):
        sys.exit(f"{options.data}: a joint tokenizer of the kind bpe is expected")
    words = subwords(tokenizer)
    options.work.mkdir(parents=True, exist_ok=True)
    write_data(options, words)
    python = environment(options.work / "environment")
    result = {
        name: getattr(options, name)
        for name in ("threads", "batch_tokens", "minutes", "turns", "updates", "seed", "quick")
    }
    result |= {"torch": version("torch"), "processor": platform.processor() or platform.machine()}
    result |= {"vocabulary": len(words), "load_before": os.getloadavg()[0]}
    measure(options, python, tokenizer, result)
    show(result)


if __name__ == "__main__":
    main()
