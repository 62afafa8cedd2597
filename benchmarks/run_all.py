"""`make bench`: every benchmark in turn; the tables printed are kept in benchmarks/results/ and in docs/speed.md.

    python benchmarks/run_all.py              all of them: about half an hour on two cores, an hour more for joeynmt
    python benchmarks/run_all.py loop ngram   only these
    python benchmarks/run_all.py joeynmt -- --minutes 7 --threads 1   one with other arguments; they are kept with its table

Each figure that is compared with another is a ratio within one run, so a slower or busier machine moves it little.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
WIKITEXT = [f"{os.environ.get('UNROLL_MIRROR', 'mirror')}/wikitext-2/{split}.txt.gz" for split in ("train", "test")]
BENCHMARKS: dict[str, tuple[str, list[str]]] = {
    "speed_lstm": ("Training speed against a plain fp32 loop and against the matrix rate", []),
    "loop": ("The training loop, Ray's local mode, waiting for data", []),
    "shape_caches": ("What oneDNN keeps of shapes of long ago", []),
    "parts": ("The batch cut into parts that any number of workers adds up alike", []),
    "tracker": ("A dead tracker", []),
    "outage": ("The MLflow server killed for ten minutes in mid-run", []),
    "ngram": ("Kneser-Ney 5-gram on WikiText-2, counted and scored", WIKITEXT),
    "media_loader": ("Reading, decoding and augmenting images beside other loaders", []),
    "beam": ("Beam search against greedy decoding", []),
    "cider": ("CIDEr-D as a reward against pycocoevalcap", []),
    "memory_prepare": ("Memory of prepare, 10 MB and 1 GB", ["--tokenizers", "characters"]),
    "memory_train": ("Memory of training, 10 MB and 1 GB", []),
    "no_change": ("dvc repro when nothing changed", []),
    "ntm": ("The neural Turing machine beside a plain one, and its cost by slots", []),
    "repro": ("unroll repro beside dvc repro", []),
    "ray_step": ("Two workers under Ray Train and under torchrun", []),
    "plan_scale": ("Order and resume of 1e9 samples on 1,024 ranks", []),
    "joeynmt": ("Translation beside JoeyNMT", []),
}
ABOUT = {
    "beam": (
        "The beam keeps below three times greedy decoding by sentences that it puts away as soon as they are done; a "
        "model with random weights ends none."
    ),
    "joeynmt": (
        "JoeyNMT comes from the package index into an environment of its own. Both systems read the same subwords of "
        "Multi30k de-en in batches of the same number of tokens, padding included, and train a model of the same "
        "shape: a bi-directional LSTM of 256, an LSTM decoder of 256 with input feeding and bilinear attention, one "
        "matrix of embeddings for source, target and output. Each runs its own training loop and its own beam search "
        "in its own process; they take turns, and speeds are ratios within a turn. JoeyNMT trains in float32, which is "
        "all it has on a CPU, and does not sort by length; ours trains in bfloat16 on batches of like length. For BLEU "
        "each trains for the same minutes, validation not counted; JoeyNMT with Adam and a rate that falls by a tenth "
        "each epoch, ours with AdamW, a cosine and averaged weights. One code scores both."
    ),
}


def run(name: str, more: list[str]) -> bool:
    """Run one benchmark with `more` arguments, show and keep its table; false if it failed."""
    title, arguments = BENCHMARKS[name]
    print(f"\n## {title}", flush=True)
    done = subprocess.run(
        [sys.executable, HERE / f"{name}.py", *arguments, *more], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    print(done.stdout, flush=True)
    if done.returncode == 0:
        used = f"$ python benchmarks/{name}.py {' '.join(more)}\n\n" if more else ""
        (HERE / "results" / f"{name}.txt").write_text(used + table(done.stdout))
    return done.returncode == 0


def table(printed: str) -> str:
    """What a benchmark printed, without the progress lines of the stages it ran."""
    progress = ("prepare ", "train: ", "score: ", "data/prepared/")
    return "".join(line for line in printed.splitlines(keepends=True) if not line.startswith(progress))


def write_page() -> None:
    """docs/speed.md from the tables kept."""
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"
    parts = [
        "# Speed and memory",
        "",
        f"Kept by `make bench` ({machine}), each table from its own run. Ratios are taken within one run.",
        "",
    ]
    for name, (title, _) in BENCHMARKS.items():
        table = HERE / "results" / f"{name}.txt"
        if table.exists():
            parts += [
                f"## {title}",
                "",
                *([ABOUT[name], ""] if name in ABOUT else []),
                f"`python benchmarks/{name}.py`",
                "",
                "```",
                table.read_text().strip(),
                "```",
                "",
            ]
    (ROOT / "docs" / "speed.md").write_text("\n".join(parts))


def main() -> None:
    given = sys.argv[1:]
    end = given.index("--") if "--" in given else len(given)
    chosen, more = given[:end] or list(BENCHMARKS), given[end + 1 :]
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        sys.exit(f"no benchmark {unknown[0]!r} (allowed: {', '.join(BENCHMARKS)})")
    failed = [name for name in chosen if not run(name, more)]
    write_page()
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
