"""`unroll repro` against `dvc repro`: overhead, many unchanged stages, two recipes at a time, many commands at once.

    overhead    40 stages that do nothing, one after another: seconds a stage beyond the start         goal <= 2 s
    unchanged   500 stages of which none changed                                                       goal <= 15 s
    two         two independent recipes of one thread each: `dvc repro` over `unroll repro --jobs 2`   goal >= 1.8 times
    starts      8 commands started at once in one checkout                                             goal: none fails

`two` needs two idle cores; it trains an LSTM for `--steps` steps twice, one after another and both at a time, in turning
order each round, and takes the median of the ratios within a round.

Run: python benchmarks/repro.py [overhead unchanged two starts] [--steps 300] [--rounds 3]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
OVERHEAD_STAGES = 40
RECIPES = 125
STARTS = 8
LSTM = {
    "suite": "two",
    "task": "language_modeling",
    "dataset": "text",
    "model": {"name": "recurrent_lm", "cell": "lstm", "layers": 1, "width": 256, "embedding": 64},
    "predict": {"split": "test"},
    "evaluate": {"metrics": ["nats_per_char"]},
}


def run(root: Path, *command: str) -> float:
    """Seconds of a command that must end well."""
    environment = {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT / "src"),
        "OMP_NUM_THREADS": "1",
        "UNROLL_TRACK": "0",
    }
    began = time.perf_counter()
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def project(root: Path, stages: dict[str, Any], params: dict[str, Any]) -> Path:
    root.mkdir(parents=True)
    (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": stages}, sort_keys=False))
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    run(root, "dvc", "init", "--no-scm", "-q")
    return root


def overhead(folder: Path, options: argparse.Namespace) -> None:
    """The difference of two lengths of a chain leaves out what the start costs."""
    seconds: dict[str, float] = {}
    for name, command in (("dvc repro", ["dvc", "repro"]), ("unroll repro", ["unroll", "repro"])):
        times = []
        for length in (1, 1 + OVERHEAD_STAGES):
            chain: dict[str, Any] = {"stage-0": {"cmd": "echo 0 > out-0", "outs": ["out-0"]}}
            for i in range(1, length):
                chain[f"stage-{i}"] = {"cmd": f"echo {i} > out-{i}", "deps": [f"out-{i - 1}"], "outs": [f"out-{i}"]}
            times.append(run(project(folder / f"{name}-{length}", chain, {"unused": 1}), *command))
        seconds[name] = (times[1] - times[0]) / OVERHEAD_STAGES
    print(f"overhead: {seconds['unroll repro']:.3f} s a stage, dvc repro {seconds['dvc repro']:.3f} s (goal <= 2 s)")


def unchanged(folder: Path, options: argparse.Namespace) -> None:
    """Prepare, train, predict and evaluate of 125 recipes, each with its parameters and a folder of code."""
    stages: dict[str, Any] = {}
    for i in range(RECIPES):
        own = {"params": [f"recipes.r{i}"]}
        stages |= {
            f"prepare-{i}": {"cmd": f"echo {i} > p{i}", "deps": ["code"], "outs": [f"p{i}"], **own},
            f"train-{i}": {"cmd": f"cp p{i} m{i}", "deps": [f"p{i}", "code"], "outs": [f"m{i}"], **own},
            f"predict-{i}": {"cmd": f"cp m{i} q{i}", "deps": [f"m{i}", f"p{i}", "code/1.py"], "outs": [f"q{i}"]},
            f"evaluate-{i}": {"cmd": f"cp q{i} e{i}.json", "deps": [f"q{i}"], "metrics": [{f"e{i}.json": {"cache": False}}]},
        }  # fmt: skip
    root = project(folder / "many", stages, {"recipes": {f"r{i}": LSTM for i in range(RECIPES)}})
    (root / "code").mkdir()
    for i in range(10):
        (root / "code" / f"{i}.py").write_text(f"number = {i}\n")
    first = run(root, "unroll", "repro", "--jobs", "2")
    again = min(run(root, "unroll", "repro", "--jobs", "2") for _ in range(options.rounds))
    serial = min(run(root, "dvc", "repro", "-q") for _ in range(options.rounds))
    print(
        f"unchanged: {len(stages)} stages in {again:.1f} s (goal <= 15 s), dvc repro {serial:.1f} s; the first run took {first:.0f} s"
    )


def two(folder: Path, options: argparse.Namespace) -> None:
    train = {
        "batch": 32, "window": 64, "steps": options.steps, "validate_every": options.steps, "log_every": 50,
        "checkpoint_every": options.steps, "optimizer": {"name": "adamw", "learning_rate": 0.002, "clip": 1.0},
    }  # fmt: skip
    splits = {"tokenizer": {"kind": "characters"}, "split": {"train": 0.9, "validation": 0.05, "test": 0.05}}
    dataset = {"preparer": "text", "licence": "public domain", "sources": [{"file": "input.txt"}], "options": splits}
    stages: dict[str, Any] = {
        "prepare": {"cmd": "python -m unroll prepare text", "deps": ["input.txt"], "outs": ["data/prepared/text"]}
    }
    for name in ("one", "other"):
        stages[name] = {
            "cmd": f"python -m unroll train {name}",
            "deps": ["data/prepared/text"],
            "outs": [f"models/{name}", f"histories/{name}"],
        }
    prepared = project(folder / "prepared", stages, {"datasets": {"text": dataset}, "suites": {"two": None}})
    shutil.copyfile(ROOT / "data/embedded/tiny-shakespeare/input.txt", prepared / "input.txt")
    (prepared / "recipes").mkdir()
    recipes = {"one": {**LSTM, "train": train, "seeds": [1]}, "other": {**LSTM, "train": train, "seeds": [2]}}
    (prepared / "recipes/language_modeling.yaml").write_text(yaml.safe_dump({"recipes": recipes}))
    run(prepared, "dvc", "repro", "-q", "prepare")
    commands = {"serial": ["dvc", "repro", "-q"], "parallel": ["unroll", "repro", "--jobs", "2"]}
    ratios, seconds = [], {name: [] for name in commands}  # type: tuple[list[float], dict[str, list[float]]]
    for number in range(options.rounds):
        for name in list(commands)[:: 1 if number % 2 else -1]:
            root = folder / f"{name}-{number}"
            shutil.copytree(prepared, root)
            seconds[name].append(run(root, *commands[name]))
        ratios.append(seconds["serial"][-1] / seconds["parallel"][-1])
    times = ", ".join(f"{name} {statistics.median(of):.1f} s" for name, of in seconds.items())
    by_round = " ".join(f"{ratio:.2f}" for ratio in ratios)
    print(f"two: {statistics.median(ratios):.2f} times as fast (goal >= 1.8); by round {by_round}; {times}")


def starts(folder: Path, options: argparse.Namespace) -> None:
    stages = {f"stage-{i}": {"cmd": f"sleep 1; echo {i} > out-{i}", "outs": [f"out-{i}"]} for i in range(4)}
    root = project(folder / "starts", stages, {"unused": 1})
    began = time.perf_counter()
    command = [str(BIN / "unroll"), "repro", "--jobs", "2"]
    commands = [subprocess.Popen(command, cwd=root, stdout=subprocess.DEVNULL) for _ in range(STARTS)]
    failed = sum(process.wait() != 0 for process in commands)
    print(f"starts: {STARTS} at once, {failed} failed, all done in {time.perf_counter() - began:.1f} s")


MEASUREMENTS = {"overhead": overhead, "unchanged": unchanged, "two": two, "starts": starts}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measurements", nargs="*", metavar="|".join(MEASUREMENTS), default=list(MEASUREMENTS))
    parser.add_argument("--steps", type=int, default=300, help="of each training of `two`")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    unknown = [name for name in options.measurements if name not in MEASUREMENTS]
    if unknown:
        parser.error(f"no measurement {unknown[0]!r} (allowed: {', '.join(MEASUREMENTS)})")
    for name in options.measurements:
        with tempfile.TemporaryDirectory() as folder:
            MEASUREMENTS[name](Path(folder), options)


if __name__ == "__main__":
    main()
