"""Captioning: an image or a clip in, a sentence out (samples: `data/captions.py`, decoding: `data/media.py`).

Training: batches of `train.batch` images or clips, each with all its captions (or some, drawn for each epoch), so that
a picture is decoded and encoded once however many sentences there are about it.

Loss: sum over the tokens of all captions, and their EOS, of -log p(token | those before it, picture), in nats;
`train.objective` adds the doubly stochastic penalty of attention, REINFORCE for hard attention, and losses over whole
captions, whose reward is CIDEr (self-critical training).

Predictions: `translations.jsonl`, one line a picture, with what is known to be in it and where the model looked;
`pictures.jsonl`: attention word by word, filmstrips, a page of the best, middle and worst.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from unroll.config import Recipe, Strict, Training, check
from unroll.data.features import EXTENSION as FEATURES
from unroll.data.features import decode_features, energy
from unroll.data.loader import MASKED
from unroll.data.media import Augmentation, decode_clip, read_image
from unroll.data.plan import SamplePlan
from unroll.data.shards import SampleReader
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import Hypothesis, LengthOptions, greedy
from unroll.errors import UserError
from unroll.layers.generator import GeneratorOutput, eos
from unroll.losses.analogy import followers, losses_without, missing_pairs, total_loss_without
from unroll.losses.cider import Cider
from unroll.progress import progress
from unroll.tasks.base import State
from unroll.tasks.generation import (
    WINDOW_SHARDS,
    GenerationObjective,
    GenerationTask,
    attends,
    batch_size,
    target_tensors,
)
from unroll.training.context import WorkerContext

LONGEST = 30
"""Words of a caption that is still generated, unless a recipe says otherwise."""


class HardAttention(Strict):
    """Weights of REINFORCE and of the entropy of where the model looks (Xu et al. 2015, section 4.1)."""

    reward: float = Field(1.0, ge=0.0)
    entropy: float = Field(0.01, ge=0.0)


class Objective(GenerationObjective):
    """`side`: pictures are cut square and scaled to it. `frames` of a clip. `augmentation`: see `data/media.py`.

    captions: how many of a picture's are in each batch, drawn for each epoch; 0: all. doubly_stochastic: weight of
    sum_p (1 - sum_t alpha_tp)^2 for each caption. hard: of a model with hard attention. spare_missing: do not teach
    that a pair of words is wrong which the training captions merely lack ("red star"), see `losses/analogy.py`; `both`:
    neither after the word before nor before the word after.
    validation: what is scored on the validation split, the mean log-loss of a token or -CIDEr-D of greedy captions.
    """

    side: int = Field(64, ge=8)
    frames: int = Field(8, ge=1)
    augmentation: Augmentation | None = None
    captions: int = Field(0, ge=0)
    doubly_stochastic: float = Field(0.0, ge=0.0)
    hard: HardAttention = HardAttention()
    spare_missing: bool | Literal["both"] = False
    validation: Literal["loss", "cider"] = "loss"

    @model_validator(mode="after")
    def one_softmax(self) -> Self:
        if self.spare_missing and self.label_smoothing:
            raise ValueError(
                "spare_missing: label_smoothing would give words that are left out a share; use one of them"
            )
        return self

    @model_validator(mode="after")
    def known_reward(self) -> Self:
        if self.sequence is not None and self.sequence.reward != "cider":
            raise ValueError(f"sequence.reward: found {self.sequence.reward!r}, captioning knows cider")
        return self


class Prediction(Strict):
    """How a split is captioned: `batch` pictures at a time; attention or a filmstrip is drawn of `pictures` of them."""

    split: str = "test"
    beam: BeamOptions = BeamOptions(longest=LONGEST)
    batch: int = Field(50, ge=1)
    pictures: int = Field(6, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"


class Task(GenerationTask):
    """Captioning of prepared images or clips."""

    objective_kind = Objective

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        if self.manifest.get("media") not in ("image", "clip"):
            raise UserError(f"{folder / 'manifest.json'}: no images or clips; captioning needs a preparer of them")
        self.vocabulary = {"target": self.manifest["vocabulary"]}

    @property
    def description(self) -> dict[str, Any]:
        """What an exported model must know to caption files that are in no data set."""
        return {"caption": {"media": self.manifest["media"], "side": self.options.side, "frames": self.options.frames}}

    @cached_property
    def options(self) -> Objective:
        """The objective, of two phases of training the last one's, since that is what a trained model sees; that of a model
        that is not trained by gradients says its side and frames alone."""
        train, place = self.recipe.train, f"recipes.{self.recipe.name}"
        objective = getattr(train.last_phase(place) if isinstance(train, Training) else train, "objective", {})
        options: Objective = check(Objective, objective, f"{place}.train.objective")
        return options

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def validation_score(self) -> str:
        """What `validate` gives: lower is better."""
        return "loss" if self.objective.validation == "loss" else "minus_cider"

    def collate(self, seed: int | None = None) -> Collate:
        return Collate(self.manifest, self.options, self.folder.name, seed)

    def plan(self, split: str, seed: int, collate: Any = None) -> tuple[SampleReader, SamplePlan]:
        """Which pictures form step n: every one counts the same, so their captions' lengths do not order them."""
        reader = SampleReader(self.folder, split)
        rows = batch_size(self.training, self.recipe.name, "batch")

        def lengths(shard: int, epoch: int) -> np.ndarray:
            return np.ones((reader.shard_counts[shard], 1), np.int64)

        return reader, SamplePlan(reader.shard_counts, lengths, rows, WINDOW_SHARDS, seed)

    def passes(self, context: WorkerContext) -> int:
        train = self.training
        return context.passes(train.parts, batch_size(train, self.recipe.name, "batch"), train.rows_per_pass)

    @cached_property
    def missing(self) -> Tensor:
        """Pairs of words that the training captions lack and analogy allows: bool [V,V]."""
        samples = every_sample(SampleReader(self.folder, "train"))
        return missing_pairs((ids for sample in samples for ids in sample["caption_ids"]), self.vocabulary["target"])

    def log_loss(self, model: Any, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        if not (self.objective.spare_missing and model.training):
            return super().log_loss(model, hidden, tokens, targets)
        scores, following = model.output.log_probabilities(hidden), self._following(targets)  # [N,V] [N]
        return total_loss_without(self.missing.to(tokens.device), scores, tokens, targets, following)

    def token_losses(self, model: Any, hidden: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        if not self.objective.spare_missing:
            return super().token_losses(model, hidden, tokens, targets)
        scores, following = model.output.log_probabilities(hidden), self._following(targets)  # [N,V] [N]
        return losses_without(self.missing.to(tokens.device), scores, tokens, targets, following)

    def _following(self, targets: Tensor) -> Tensor | None:
        """The word after each of `targets` [N], if words that are missing before it are spared."""
        return followers(targets, eos(self.vocabulary["target"])) if self.objective.spare_missing == "both" else None

    def extra_losses(self, model: Any, output: GeneratorOutput, targets: Tensor) -> Tensor | float:
        options, extra = self.objective, torch.zeros((), device=targets.device)
        if options.doubly_stochastic and output.attention is not None:
            extra = extra + options.doubly_stochastic * doubly_stochastic(output.attention, targets)
        if output.extras:
            losses = model.output.log_loss(output.hidden.detach().flatten(0, 1), targets.flatten())  # [N*T]
            extra = extra + reinforce(output.extras, -losses.detach().view_as(targets), targets, options.hard)
        return extra

    @cached_property
    def cider(self) -> Cider:
        """CIDEr with the document frequencies of the training captions, EOS counted as a word."""
        samples = every_sample(SampleReader(self.folder, "train"))
        documents = (target_tensors(sample["caption_ids"], self.vocabulary["target"]) for sample in samples)
        return Cider((tensors["targets"].numpy() for tensors in documents), self.vocabulary["target"])

    def costs(self, candidates: Tensor, targets: Tensor, sources: int) -> Tensor:
        """1 - CIDEr-D / 10 of candidates [B*K,T] against targets [B*K',T'], EOS counted as a word: [B,K]."""
        scores = self.cider.scores(candidates.cpu().numpy(), targets.cpu().numpy(), sources)
        return 1 - torch.from_numpy(scores).float().to(targets.device) / 10

    @torch.no_grad()
    def validate(self, model: Any, context: WorkerContext) -> float:
        """Nats per target token on the validation split, or -CIDEr-D of its greedy captions."""
        if self.objective.validation == "loss":
            return self.mean_log_loss(model, context)
        [score] = context.sum([-self.greedy_cider(model, context.device) if context.is_first else 0.0])
        return score

    def greedy_cider(self, model: Any, device: torch.device) -> float:
        """CIDEr-D, 0 to 10, of greedy captions of the validation split, over tokens."""
        said: list[list[int]] = []
        captions: list[list[np.ndarray]] = []
        for samples, memory in self.memories(model, "validation", 100, device):
            said += [found.tokens for found in greedy(model, memory, LengthOptions(longest=LONGEST))]
            captions += [sample["caption_ids"] for sample in samples]
        return float(np.mean(token_cider(said, captions, self.vocabulary["target"])))

    def fit(self, model: Any) -> None:
        """What a model learns that is not trained by gradients: it is shown every picture and its first caption once."""
        samples, collate = list(every_sample(SampleReader(self.folder, "train"))), self.collate()
        batches = (samples[start : start + 100] for start in range(0, len(samples), 100))
        model.fit((collate.pictures(part, [0] * len(part)), [s["caption_ids"][0] for s in part]) for part in batches)

    # --- predictions ------------------------------------------------------------------------------------------------

    def memories(
        self, model: Any, split: str, batch: int, device: torch.device
    ) -> Iterator[tuple[list[dict[str, Any]], State]]:
        """The pictures of a split, `batch` at a time, and what the model made of them."""
        samples, collate = list(every_sample(SampleReader(self.folder, split))), self.collate()
        for start in range(0, len(samples), batch):
            part = samples[start : start + batch]
            inputs = collate.pictures(part, [0] * len(part))
            if model.reads == "captions":
                inputs = {"captions": target_tensors([spoken(s) for s in part], self.vocabulary["target"])["targets"]}
            yield part, model.encode({name: tensor.to(device) for name, tensor in inputs.items()})

    @torch.no_grad()
    def predict(self, model: Any, out: Path, seed: int, device: torch.device) -> None:
        """Write `translations.jsonl` (one line a picture, in the split's order), `lexicon.json` and the pictures."""
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        found: list[tuple[dict[str, Any], Hypothesis]] = []
        total = SampleReader(self.folder, options.split).samples
        faster = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
        with progress(f"caption {options.split}", total) as bar, faster:
            for samples, memory in self.memories(model, options.split, options.batch, device):
                best = beam_search(model, memory, options.beam, with_attention=attends(memory))
                found += [(sample, hypotheses[0]) for sample, hypotheses in zip(samples, best, strict=True)]
                bar.advance(len(samples))
        found.sort(key=lambda pair: pair[0]["id"])
        lines = [self.line(sample, said, model.reads == "captions") for sample, said in found]
        (out / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if "lexicon" in self.manifest:
            (out / "lexicon.json").write_text(json.dumps(self.manifest["lexicon"]))
        self.write_pictures(found, lines, options.pictures, out)

    def line(self, sample: dict[str, Any], found: Hypothesis, human: bool = False) -> dict[str, Any]:
        """What the predictions file says of one picture. `words` and `looked` of a model with attention: the middle of
        the region, x and y as shares of the side, that it looked at most for each word."""
        references = list(sample["captions"])
        if human and len(references) > 1:
            del references[sample["id"] % len(references)]
        line = {
            "id": sample["id"],
            "source": sample["key"],
            "references": references,
            "hypothesis": self.text(found.tokens),
            "score": found.score,
            "tokens": len(found.tokens),
            **({"truth": sample["truth"]} if "truth" in sample else {}),
        }
        if found.attention is not None and self.manifest["media"] == "image":
            side = round(found.attention.shape[1] ** 0.5)
            peaks = [divmod(int(weights.argmax()), side) for weights in found.attention]
            line["words"] = self.words(found.tokens)
            line["looked"] = [[(column + 0.5) / side, (row + 0.5) / side] for row, column in peaks]
            line["grid"] = side
        return line

    def words(self, tokens: list[int]) -> list[str]:
        """Each token as text."""
        return [self.target_tokenizer.decode([token]).strip() for token in tokens]

    # --- pictures ---------------------------------------------------------------------------------------------------

    def write_pictures(
        self, found: list[tuple[dict[str, Any], Hypothesis]], lines: list[dict[str, Any]], count: int, out: Path
    ) -> None:
        """`pictures.jsonl`: pages of the best, middle and worst by CIDEr-D, and `count` of them one by one."""
        if not count:
            return
        (out / "files").mkdir()
        ids = [sample["caption_ids"] for sample, _ in found]
        scores = token_cider([said.tokens for _, said in found], ids, self.vocabulary["target"])  # [n]
        order = np.argsort(-scores, kind="stable")
        middle = max(0, (len(order) - SHOWN) // 2)
        pages = {"best": order[:SHOWN], "median": order[middle : middle + SHOWN], "worst": order[-SHOWN:]}
        pictures = [
            {
                "kind": "captions",
                "title": f"{rank.capitalize()} captions",
                "text": "by their CIDEr-D, 0 to 10; below each what a person wrote",
                "data": {"items": [self._item(found[i][0], lines[i], float(scores[i]), out) for i in chosen]},
            }
            for rank, chosen in pages.items()
        ]
        spread = order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]
        pictures += [picture for i in spread if (picture := self._alone(found[i], lines[i], out)) is not None]
        (out / "pictures.jsonl").write_text("".join(json.dumps(picture) + "\n" for picture in pictures))

    def _item(self, sample: dict[str, Any], line: dict[str, Any], score: float, out: Path) -> dict[str, Any]:
        """One picture of a page."""
        files = self._files(sample, out)
        reference = line["references"][0]
        return {"file": files[len(files) // 2], "caption": line["hypothesis"], "reference": reference, "score": score}

    def _alone(
        self, found: tuple[dict[str, Any], Hypothesis], line: dict[str, Any], out: Path
    ) -> dict[str, Any] | None:
        """Attention over an image, or a filmstrip; none of an image without attention, which the pages show."""
        sample, said = found
        weights = None if said.attention is None else np.round(said.attention, 4).tolist()
        data = {"files": self._files(sample, out), "words": self.words(said.tokens), "weights": weights}
        data |= {"caption": line["hypothesis"], "reference": line["references"][0]}
        title = f"{sample['key']}: {line['hypothesis']}"
        if self.manifest["media"] == "clip":
            return {"kind": "filmstrip", "title": title, "text": "frames in time", "data": data}
        if weights is None:
            return None
        return {"kind": "image_attention", "title": title, "text": "where the model looked for each word", "data": data}

    def _files(self, sample: dict[str, Any], out: Path) -> list[str]:
        """What the model saw of a picture as PNG files below `out`: one of an image, all frames of a clip."""
        from PIL import Image

        pixels = self.collate().pixels(sample, 0)  # [F,H,W,3]
        if sample.get("extension") == FEATURES:
            pixels = energy(pixels)
        names = [f"files/{sample['id']}-{number}.png" for number in range(len(pixels))]
        for name, frame in zip(names, pixels, strict=True):
            if not (out / name).exists():
                Image.fromarray(frame).save(out / name)
        return names


SHOWN = 8
"""Pictures on a page."""
DECODED_BYTES = 2**27
"""Of pictures that are kept decoded, where none is augmented: a small set is decoded in the first epoch alone."""


class Collate:
    """Samples to tensors: `image` uint8 [B,H,W,3], or `frames` [B,F,H,W,3] and `frame_counts` [B]; `tokens` and `targets`
    [B*K,T], the K captions of a picture side by side. With a seed pictures are augmented and captions drawn."""

    def __init__(self, manifest: dict[str, Any], options: Objective, name: str, seed: int | None = None) -> None:
        self.media, self.options, self.name, self.seed = manifest["media"], options, name, seed
        self.vocabulary = manifest["vocabulary"]
        self.channels: int = manifest.get("features", {}).get("channels", 0)
        self._decoded: dict[str, np.ndarray] = {}
        self._room = DECODED_BYTES

    def __call__(self, samples: list[dict[str, Any]], keys: list[int]) -> dict[str, Tensor]:
        captions = [self.captions(sample, key) for sample, key in zip(samples, keys, strict=True)]
        count = max(map(len, captions), default=1)
        rows = [(chosen + [None] * count)[:count] for chosen in captions]
        targets = target_tensors([ids for chosen in rows for ids in chosen], self.vocabulary)
        return {**self.pictures(samples, keys), **targets}

    def captions(self, sample: dict[str, Any], key: int) -> list[np.ndarray | None]:
        """The captions of a picture that this batch has."""
        every: list[np.ndarray | None] = list(sample["caption_ids"])
        if self.seed is None or not self.options.captions:
            return every
        order = np.random.default_rng([self.seed, key]).permutation(len(every))
        return [every[number] for number in order[: self.options.captions]]

    def pictures(self, samples: list[dict[str, Any]], keys: list[int]) -> dict[str, Tensor]:
        """The tensors of the pictures alone."""
        shown = [self.pixels(sample, key) for sample, key in zip(samples, keys, strict=True)]  # [F,H,W,3] each
        frames = torch.from_numpy(np.stack(shown) if shown else self.nothing())
        if self.media == "image":
            return {"image": frames[:, 0]}
        return {"frames": frames, "frame_counts": torch.full((len(frames),), frames.shape[1])}

    def nothing(self) -> np.ndarray:
        """What is seen in a batch without rows."""
        if self.channels:
            return np.zeros((0, 1, self.channels, 1, 1), np.float16)
        return np.zeros((0, 1, self.options.side, self.options.side, 3), np.uint8)

    def pixels(self, sample: dict[str, Any], key: int) -> np.ndarray:
        """What the model sees of a picture: uint8 [F,H,W,3], or stored features [F,C,h,w]; of an image F = 1."""
        options, place = self.options, f"{self.name}: {sample['key']}"
        if sample.get("extension") == FEATURES:
            features = decode_features(sample["media"], place)
            return features[None] if self.media == "image" else features
        augmentation = None if self.seed is None else options.augmentation
        if sample["key"] in self._decoded:
            return self._decoded[sample["key"]]
        if self.media == "image":
            pixels = read_image(sample["media"], options.side, place, augmentation, key)[None]
        else:
            pixels = decode_clip(sample["media"], options.frames, options.side, place, augmentation, key)
        if augmentation is None and pixels.nbytes <= self._room:
            self._room -= pixels.nbytes
            self._decoded[sample["key"]] = pixels
        return pixels


def every_sample(reader: SampleReader) -> Iterator[dict[str, Any]]:
    """The samples of a split in order."""
    for shard, count in enumerate(reader.shard_counts):
        for index in range(count):
            yield reader.sample(shard, index)


def spoken(sample: dict[str, Any]) -> np.ndarray:
    """The caption that stands for a person's, who is measured by the others: each of them in turn."""
    ids: np.ndarray = sample["caption_ids"][sample["id"] % len(sample["caption_ids"])]
    return ids


def token_cider(said: Sequence[list[int]], captions: Sequence[list[np.ndarray]], vocabulary: int) -> np.ndarray:
    """CIDEr-D of each caption, 0 to 10, by its tokens, with the document frequencies of these references: [n]."""
    count, end = max(map(len, captions)), eos(vocabulary)
    rows = [(list(each) + [None] * count)[:count] for each in captions]
    references = target_tensors([ids for each in rows for ids in each], vocabulary)["targets"].numpy()
    references = np.where(references == end, MASKED, references)  # [n*K,T]
    hypotheses = target_tensors([np.array(tokens, np.int64) for tokens in said], vocabulary)["targets"].numpy()
    hypotheses = np.where(hypotheses == end, MASKED, hypotheses)
    cider = Cider(references.reshape(len(captions), count, -1), vocabulary)
    scores: np.ndarray = cider.scores(hypotheses, references, len(captions))[:, 0]
    return scores


def doubly_stochastic(attention: Tensor, targets: Tensor) -> Tensor:
    """sum_p (1 - sum_t alpha_tp)^2 of each caption, counted as often as it has target tokens: a sum. [N,T,P], [N,T]"""
    real = targets >= 0  # [N,T]
    spent = (attention * real[..., None]).sum(1)  # [N,P]
    return ((1 - spent).square().sum(1) * real.sum(1)).sum()


def reinforce(extras: dict[str, Tensor], log_probabilities: Tensor, targets: Tensor, options: HardAttention) -> Tensor:
    """The loss of the choices of hard attention, all [N,T]: a sum over target tokens.

    The reward of a caption is the mean of its words' log-probabilities; the baseline follows it.
    """
    real = (targets >= 0).float()  # [N,T]
    reward = ((log_probabilities * real).sum(1) / real.sum(1).clamp_min(1))[:, None]  # [N,1]
    advantage = reward - extras["baseline"].detach()  # [N,T]
    choices = -options.reward * advantage * extras["log_choice"] - options.entropy * extras["entropy"]
    follow = 0.5 * (extras["baseline"] - reward).square()
    return ((choices + follow) * real).sum()
