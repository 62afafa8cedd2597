"""Reading, decoding and augmenting 224-pixel JPEGs from shards, beside the decoder alone and two other loaders.

    python benchmarks/media_loader.py            prints a table, writes benchmarks/results/media_loader.json

Every system gives batches of 32 random crops, mirrored half of the time, as uint8 [B,224,224,3], in one process without
helpers. Photographs of flickr8k-subset, made 256 pixels on the shorter side; drawn scenes where the mirror lacks them.

    decoder      this project's decoder and crops on files that are in memory: the limit
    ours         the same from shards, in the order of a plan, through the sample loader
    webdataset   WebDataset(shards).decode("pil").map(crop).batched(32) on the same shards
    folder       a torch DataLoader over a folder of the same files: Image.open, RGB, crop

The three crop alike: a part of the area between 0.4 and 1, stretched by up to 4/3, bilinear. Ratios are of processor
time within a round, in which the systems take turns; medians over rounds, with an interval of 95 % from 10,000 resamples
of the rounds, as neighbours on a shared machine move a single ratio by a tenth and more. Memory is the growth of the
resident set while an epoch is read, not decoded, for a set and for one four times as large.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from unroll.config import load_dataset
from unroll.data.captions import Captioned, CaptionWriter, learn_tokenizer, save_tokenizer
from unroll.data.loader import SampleLoader
from unroll.data.media import Augmentation, encode_jpeg, read_image
from unroll.data.plan import SamplePlan
from unroll.data.shards import SampleReader
from unroll.data.tokenizers import TokenizerOptions
from unroll.data.writers import SHARD_BYTES, write_manifest
from unroll.datasets import drawn_scenes, image_captions
from unroll.errors import UserError
from unroll.memory import keep_freed_memory

ROOT = Path(__file__).parents[1]
RESULT = Path(__file__).parent / "results" / "media_loader.json"
SIDE, SHORTER, BATCH = 224, 256, 32
LENGTH = 16
PASSES = 2
SMALL_SHARD, WINDOW = 2**19, 4
"""So that a window of shards is a part of this small set, and every epoch reads all of it again, as with a large one."""
AUGMENTATION = Augmentation(smallest=0.4, stretch=4 / 3, flip=True)


# ---------------------------------------------------------------- the images


def photographs(folder: Path) -> tuple[str, list[bytes]]:
    """JPEGs whose shorter side is `SHORTER`, and what they are."""
    try:
        entry = load_dataset(ROOT, "flickr8k-subset")
        image_captions.prepare(entry, "flickr8k-subset", ROOT, folder / "photographs")
        name = "flickr8k-subset"
    except UserError:
        options = {"side": SHORTER, "samples": {"train": 300}}
        entry = load_dataset(ROOT, "scenes").model_copy(update={"options": options})
        drawn_scenes.prepare(entry, "scenes", ROOT, folder / "photographs")
        name = "drawn scenes"
    reader = SampleReader(folder / "photographs", "train")
    images = []
    for index in range(min(reader.shard_counts[0], 300)):
        image = Image.open(io.BytesIO(reader.sample(0, index)["media"])).convert("RGB")
        scale = SHORTER / min(image.size)
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
        images.append(encode_jpeg(np.asarray(image)))
    return name, images


def write_shards(folder: Path, images: list[bytes], times: int = 1, shard_bytes: int = SHARD_BYTES // 4) -> None:
    """The images, `times` over, as a prepared data set."""
    caption = " ".join(["word"] * (LENGTH - 1))
    tokenizer = learn_tokenizer([("caption", caption)], TokenizerOptions(kind="words"))
    folder.mkdir()
    with CaptionWriter(folder, "train", tokenizer, shard_bytes) as writer:
        for number in range(times * len(images)):
            writer.write(Captioned(str(number), images[number % len(images)], "jpg", [caption] * 5))
    written = {"kind": "samples", "media": "image", "splits": {"train": writer.summary}}
    write_manifest(folder, {**written, **save_tokenizer(tokenizer, folder)})


# ---------------------------------------------------------------- the systems


def collate(samples: list[dict[str, Any]], keys: list[int]) -> dict[str, torch.Tensor]:
    pixels = [read_image(s["media"], SIDE, s["key"], AUGMENTATION, key) for s, key in zip(samples, keys, strict=True)]
    return {"image": torch.from_numpy(np.stack(pixels))}


def undecoded(samples: list[dict[str, Any]], keys: list[int]) -> dict[str, torch.Tensor]:
    """Batches without pictures, to read a gigabyte in seconds."""
    return {"image": torch.tensor([len(sample["media"]) for sample in samples])}


def decoder(images: list[bytes]) -> Iterator[torch.Tensor]:
    for first in range(0, len(images), BATCH):
        batch = images[first : first + BATCH]
        pixels = [read_image(data, SIDE, "image", AUGMENTATION, first + n) for n, data in enumerate(batch)]
        yield torch.from_numpy(np.stack(pixels))


def ours(
    folder: Path, make: Callable[..., dict[str, torch.Tensor]] = collate, passes: int = PASSES
) -> Iterator[torch.Tensor]:
    reader = SampleReader(folder, "train")
    plan = SamplePlan(reader.shard_counts, reader.lengths, BATCH * LENGTH, WINDOW, seed=1)
    batches = sum(len(plan.batches(window)) for window in range(passes * plan.windows_per_epoch))
    with SampleLoader(reader, plan, make) as loader:
        for _, items in zip(range(batches), loader, strict=False):
            yield items[0].tensors["image"]


def crop(image: Image.Image) -> np.ndarray:
    """A random part of an image, as anyone writes it without a library: the same distribution as `AUGMENTATION`."""
    width, height = image.size
    side = min(width, height)
    area, stretch = random.uniform(0.4, 1), (4 / 3) ** random.uniform(-1, 1)
    across, down = min(width, side * (area * stretch) ** 0.5), min(height, side * (area / stretch) ** 0.5)
    left, top = random.uniform(0, width - across), random.uniform(0, height - down)
    part = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + across, top + down))
    if random.random() < 0.5:
        part = part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.array(part)


def web_dataset(folder: Path) -> Iterator[torch.Tensor]:
    import webdataset

    paths = sorted(str(path) for path in folder.glob("train-*.tar"))
    data = webdataset.WebDataset(paths, shardshuffle=False, empty_check=False)
    pipeline = (
        data.shuffle(1000).decode("pil").map(lambda sample: (torch.from_numpy(crop(sample["jpg"])),)).batched(BATCH)
    )
    for (images,) in pipeline:
        yield images


class Folder(torch.utils.data.Dataset[torch.Tensor]):
    """A folder of images, as torchvision's ImageFolder reads one."""

    def __init__(self, folder: Path) -> None:
        self.paths = sorted(folder.iterdir())

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        with self.paths[index].open("rb") as file:
            return torch.from_numpy(crop(Image.open(file).convert("RGB")))


def image_folder(folder: Path) -> Iterator[torch.Tensor]:
    yield from torch.utils.data.DataLoader(Folder(folder), BATCH, shuffle=True)


# ---------------------------------------------------------------- measuring


def repeated(system: str, make: Callable[[], Iterator[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """`PASSES` epochs. Our loader goes on by itself, and decodes a few batches ahead of where it is stopped."""
    for _ in range(1 if system == "ours" else PASSES):
        yield from make()


def seconds(batches: Iterator[torch.Tensor], expected: int) -> tuple[float, float]:
    """Processor and wall seconds until the last image has come."""
    cpu, wall, images = time.process_time(), time.perf_counter(), 0
    for batch in batches:
        images += len(batch)
        if images == expected:
            return time.process_time() - cpu, time.perf_counter() - wall
    raise SystemExit(f"{images} images came, {expected} expected")


MEMORY = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from media_loader import ours, undecoded
def resident(key):
    return int(Path("/proc/self/status").read_text().partition(key)[2].split()[0]) / 1024
start = resident("VmRSS:")
for batch in ours(Path(sys.argv[1]), undecoded, passes=1):
    pass
print(resident("VmHWM:") - start)
"""


def megabytes(folder: Path) -> float:
    code = MEMORY.format(folder=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--megabytes", type=int, default=300, help="of the smaller set whose memory is measured")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training does
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        source, images = photographs(root)
        write_shards(root / "shards", images, shard_bytes=SMALL_SHARD)
        (root / "files").mkdir()
        for number, data in enumerate(images):
            (root / "files" / f"{number:05d}.jpg").write_bytes(data)
        systems: dict[str, Callable[[], Iterator[torch.Tensor]]] = {
            "decoder": lambda: decoder(images),
            "ours": lambda: ours(root / "shards"),
            "webdataset": lambda: web_dataset(root / "shards"),
            "folder": lambda: image_folder(root / "files"),
        }
        for make in systems.values():  # files and caches warm
            next(make())
        rounds = []
        for number in range(chosen.rounds):
            order = list(systems)[number % 4 :] + list(systems)[: number % 4]
            rounds.append(
                {system: seconds(repeated(system, systems[system]), PASSES * len(images)) for system in order}
            )
        once = sum(map(len, images))
        for size, times in (("small", 1), ("large", 4)):
            write_shards(root / size, images, round(times * chosen.megabytes * 1e6 / once))
        memory = {size: round(megabytes(root / size)) for size in ("small", "large")}
        stored = {s: sum(p.stat().st_size for p in (root / s).glob("*.tar")) / 2**20 for s in ("small", "large")}
    result = report(source, images, rounds, memory, stored)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


def report(
    source: str,
    images: list[bytes],
    rounds: list[dict[str, tuple[float, float]]],
    memory: dict[str, int],
    stored: dict[str, float],
) -> dict[str, Any]:
    size = sum(map(len, images)) / len(images) / 1000
    print(f"{len(images)} JPEGs of {source}, shorter side {SHORTER}, {size:.0f} kB each; crops of {SIDE} x {SIDE}")
    print(f"{len(rounds)} rounds")
    print(f"{'system':<12}{'images/s of processor time':>28}{'our speed / its speed':>32}   wall time")
    drawn = np.random.default_rng(1).integers(0, len(rounds), (10_000, len(rounds)))
    table = {}
    for system in rounds[0]:
        speed = statistics.median(PASSES * len(images) / row[system][0] for row in rounds)
        cpu = np.array([row[system][0] / row["ours"][0] for row in rounds])
        wall = statistics.median(row[system][1] / row["ours"][1] for row in rounds)
        ratio = statistics.median(cpu.tolist())
        low, high = np.quantile(np.median(cpu[drawn], axis=1), (0.025, 0.975)).tolist()
        shown = f"{ratio:.3f} [{low:.3f}, {high:.3f}]"
        goal = {"decoder": "   goal >= 0.95", "webdataset": "   goal > 1", "folder": "   goal > 1"}.get(system, "")
        print(f"{system:<12}{speed:>28.0f}{shown:>32}{wall:>12.3f}{goal}")
        found = {"images_per_second": speed, "our_speed_over_its": ratio, "interval": [low, high]}
        table[system] = {**found, "wall": wall}
    for name, grown in memory.items():
        print(f"memory of an epoch of {stored[name]:.0f} MB of shards: {grown} MB above the start")
    head = {"source": source, "images": len(images), "rounds": len(rounds)}
    return {**head, "systems": table, "memory_mb": memory, "stored_mb": stored}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
