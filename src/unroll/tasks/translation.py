"""Translation: a source sentence in, a target sentence out, both as token ids of parallel text (`data/pairs.py`).

Training: batches of about `train.batch_tokens` tokens (rows x longest side), pairs of like length together. The source
is followed by EOS; the target is opened by BOS and closed by EOS, and the model is given the true token before each one
that it predicts (teacher forcing).

Loss: sum over target tokens and EOS of -log p(token | those before it, source), in nats; `train.objective` smooths it,
draws other subwords for each sentence and epoch (BPE-dropout), feeds the model's own tokens back (scheduled sampling),
or puts a loss over whole candidate translations in its place (`losses/sequence.py`).

Predictions: beam search over a split in batches; the hypotheses do not depend on what is in a batch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from unroll.config import Recipe, Strict, check
from unroll.data.plan import SamplePlan, sample_key
from unroll.data.shards import SampleReader
from unroll.data.tokenizers import SubwordSampler, Tokenizer
from unroll.data.tokenizers import load as load_tokenizer
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import Hypothesis, LengthOptions, greedy
from unroll.errors import UserError
from unroll.layers.generator import eos
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

if TYPE_CHECKING:
    from sacrebleu.metrics.bleu import BLEUScore


def sentence_bleu(found: BLEUScore) -> float:
    """BLEU of one sentence, 0 to 1, add-one smoothed (Lin & Och 2004), its reference counting as a word longer: without
    it the smoothing favours candidates that are too short (Nakov, Guzman & Vogel 2012, "Optimizing for sentence-level
    BLEU+1 yields short translations")."""
    from sacrebleu import BLEU

    counted = found.counts, found.totals, found.sys_len, found.ref_len + 1
    return float(BLEU.compute_bleu(*counted, smooth_method="add-k", smooth_value=1, effective_order=True).score) / 100


def gleu(found: BLEUScore) -> float:
    """GLEU of one sentence (Wu et al. 2016, 1609.08144, section 5.2): the smaller of precision and recall of all
    n-grams of 1 to 4 tokens together. It favours neither short nor long candidates."""
    of_reference = sum(max(0, found.ref_len - n) for n in range(4))
    return float(sum(found.counts)) / max(sum(found.totals), of_reference, 1)


REWARDS = {"bleu": sentence_bleu, "gleu": gleu}
"""By the name in a recipe: what a candidate is worth, 0 to 1, from its counts of n-grams."""


class Objective(GenerationObjective):
    """Beside what all have: `subword_dropout`: probability that a merge of the BPE is left out. `validation`: what is
    scored on the validation split, the mean log-loss of a token or -BLEU of greedy translations."""

    subword_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    validation: Literal["loss", "bleu"] = "loss"

    @model_validator(mode="after")
    def known_reward(self) -> Self:
        if self.sequence is not None and self.sequence.reward not in REWARDS:
            raise ValueError(f"sequence.reward: found {self.sequence.reward!r}, translation knows {', '.join(REWARDS)}")
        return self


class Prediction(Strict):
    """How a split is translated: `batch` sentences at a time; attention is kept of the first `pictures` sentences, of
    as many of the worst and of the longest. `ensemble`: the models of all seeds vote at every step."""

    split: str = "test"
    beam: BeamOptions = BeamOptions()
    batch: int = Field(100, ge=1)
    pictures: int = Field(3, ge=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    ensemble: bool = False


class Task(GenerationTask):
    """Translation on prepared pairs."""

    objective_kind = Objective

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        super().__init__(recipe, folder)
        if "source_vocabulary" not in self.manifest:
            raise UserError(f"{folder / 'manifest.json'}: no pairs of texts; translation needs a preparer of pairs")
        self.vocabulary = {"source": self.manifest["source_vocabulary"], "target": self.manifest["vocabulary"]}
        kept = ("lowercase", "source_language", "target_language")
        self.description = {"text": {key: self.manifest.get(key) for key in kept}}

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def validation_score(self) -> str:
        """What `validate` gives: lower is better."""
        return "loss" if self.objective.validation == "loss" else "minus_bleu"

    def collate(self, seed: int | None = None) -> Collate:
        if seed is None:
            return Collate(self.folder, self.manifest)
        return Collate(self.folder, self.manifest, self.objective.subword_dropout, seed)

    def plan(self, split: str, seed: int, collate: Any = None) -> tuple[SampleReader, SamplePlan]:
        """Which pairs form step n. A `collate` that draws subwords says how long the pairs are in each epoch."""
        tokens = batch_size(self.training, self.recipe.name, "batch_tokens")
        reader = SampleReader(self.folder, split)

        def drawn_lengths(shard: int, epoch: int) -> np.ndarray:
            pairs = [(reader.sample(shard, i), sample_key(epoch, shard, i)) for i in range(reader.shard_counts[shard])]
            sides = [
                [len(ids) + 1 for ids in collate.ids(side, *map(list, zip(*pairs, strict=True)))] for side in (1, 0)
            ]
            return np.array(sides, np.int64).T  # [samples,2]

        lengths = drawn_lengths if collate and collate.samplers else reader.lengths
        return reader, SamplePlan(reader.shard_counts, lengths, tokens, WINDOW_SHARDS, seed)

    def passes(self, context: WorkerContext) -> int:
        train = self.training
        if train.tokens_per_pass is None:
            return context.passes(train.parts)
        tokens = batch_size(train, self.recipe.name, "batch_tokens")
        return -(-tokens // (context.size * train.tokens_per_pass))

    def total_steps(self, seed: int) -> int:
        if self.training.steps is None and self.objective.subword_dropout:
            place = f"recipes.{self.recipe.name}.train"
            raise UserError(f"{place}.epochs: with subword_dropout every epoch has other batches; state steps instead")
        return super().total_steps(seed)

    def costs(self, candidates: Tensor, targets: Tensor, sources: int) -> Tensor:
        """1 - reward of candidates [B*K,T] against targets [B,T'], as texts: [B,K]."""
        from sacrebleu import BLEU

        metric = BLEU(effective_order=True, lowercase=self.manifest["lowercase"])
        assert self.objective.sequence is not None
        reward = REWARDS[self.objective.sequence.reward]
        references, texts = ([self.text(row) for row in rows.tolist()] for rows in (targets, candidates))
        count = len(texts) // len(references)
        scores = [reward(metric.sentence_score(text, [references[i // count]])) for i, text in enumerate(texts)]
        return 1 - torch.tensor(scores).view(-1, count).to(targets.device)

    @torch.no_grad()
    def validate(self, model: Any, context: WorkerContext) -> float:
        """Nats per target token on the validation split, or -BLEU of its greedy translations."""
        if self.objective.validation == "bleu":
            [score] = context.sum([-self.greedy_bleu(model, context.device) if context.is_first else 0.0])
            return score
        return self.mean_log_loss(model, context)

    def greedy_bleu(self, model: Any, device: torch.device) -> float:
        """BLEU (13a, case-insensitive where the data are) of greedy translations of the validation split."""
        import sacrebleu

        hypotheses, references = [], []
        for samples, memory in self.memories(model, "validation", 200, device):
            hypotheses += [self.text(found.tokens) for found in greedy(model, memory, LengthOptions())]
            references += [sample["target_text"] for sample in samples]
        score = sacrebleu.corpus_bleu(hypotheses, [references], lowercase=self.manifest["lowercase"])
        return float(score.score)

    # --- predictions ------------------------------------------------------------------------------------------------

    def memories(
        self, model: Any, split: str, batch: int, device: torch.device
    ) -> Iterator[tuple[list[dict[str, Any]], State]]:
        """The sentences of a split, `batch` of like length at a time, and what the model made of their sources."""
        reader = SampleReader(self.folder, split)
        places = [(shard, index) for shard, count in enumerate(reader.shard_counts) for index in range(count)]
        lengths = np.concatenate([reader.lengths(shard) for shard in range(len(reader.shard_counts))])  # [n,2]
        order = np.argsort(lengths[:, 1], kind="stable").tolist()
        for start in range(0, len(order), batch):
            samples = [reader.sample(*places[number]) for number in order[start : start + batch]]
            yield samples, model.encode({name: tensor.to(device) for name, tensor in source_tensors(
                [sample["source"] for sample in samples], self.vocabulary["source"]).items()})  # fmt: skip

    @torch.no_grad()
    def predict(self, model: Any, out: Path, seed: int, device: torch.device) -> None:
        """Write `translations.jsonl` (one line a sentence, in the split's order) and `attention.jsonl` into `out`."""
        options: Prediction = check(Prediction, self.recipe.predict, f"recipes.{self.recipe.name}.predict")
        found: dict[int, tuple[dict[str, Any], Hypothesis]] = {}
        reader = SampleReader(self.folder, options.split)
        faster = torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16")
        with progress(f"translate {options.split}", reader.samples) as bar, faster:
            for samples, memory in self.memories(model, options.split, options.batch, device):
                best = beam_search(model, memory, options.beam, with_attention=attends(memory))
                found |= {s["id"]: (s, b[0]) for s, b in zip(samples, best, strict=True)}
                bar.advance(len(samples))
        lines = [self.line(*found[number]) for number in sorted(found)]
        (out / "translations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        pictures = [self.picture(*found[number], reason) for number, reason in chosen(lines, options.pictures).items()]
        pictures = [picture for picture in pictures if picture is not None]
        (out / "attention.jsonl").write_text("".join(json.dumps(picture) + "\n" for picture in pictures))

    def line(self, sample: dict[str, Any], found: Hypothesis) -> dict[str, Any]:
        """What the predictions file says of one sentence."""
        return {
            "id": sample["id"],
            "source": sample["source_text"],
            "references": [sample["target_text"]],
            "hypothesis": self.text(found.tokens),
            "score": found.score,
            "tokens": len(found.tokens),
            "source_tokens": len(sample["source"]),
        }

    def picture(self, sample: dict[str, Any], found: Hypothesis, reason: str) -> dict[str, Any] | None:
        """Attention of one sentence, rows and columns labelled; none for a model without attention."""
        if found.attention is None:
            return None
        source = load_tokenizer(self.folder / self.manifest["source_tokenizer"])
        return {
            "id": sample["id"],
            "source": [*pieces(source, sample["source"].tolist()), "</s>"],
            "target": pieces(self.target_tokenizer, found.tokens),
            "weights": np.round(found.attention, 4).tolist(),
            "reason": reason,
        }


class Collate:
    """Pairs to tensors: `source` [B,S] (EOS at the end), `source_lengths` [B], `tokens` [B,T] (BOS first) and `targets`
    [B,T] (EOS last, -1 where there is nothing to predict). With `dropout` both sides get other subwords for each key."""

    def __init__(self, folder: Path, manifest: dict[str, Any], dropout: float = 0.0, seed: int = 0) -> None:
        self.sizes = (manifest["source_vocabulary"], manifest["vocabulary"])
        self.lowercase = manifest["lowercase"]
        self.samplers: list[SubwordSampler] = []
        if dropout:
            names = (manifest["source_tokenizer"], manifest["tokenizer"])
            self.samplers = [
                SubwordSampler(load_tokenizer(folder / name), dropout, 2 * seed + side)
                for side, name in enumerate(names)
            ]

    def __call__(self, samples: list[dict[str, Any]], keys: list[int]) -> dict[str, Tensor]:
        sources, targets = (self.ids(side, samples, keys) for side in (0, 1))
        return {**source_tensors(sources, self.sizes[0]), **target_tensors(targets, self.sizes[1])}

    def ids(self, side: int, samples: list[dict[str, Any]], keys: list[int]) -> list[np.ndarray]:
        name = ("source", "target")[side]
        if not self.samplers:
            return [sample[name] for sample in samples]
        texts = [sample[f"{name}_text"] for sample in samples]
        texts = [text.lower() for text in texts] if self.lowercase else texts
        return [self.samplers[side].encode(text, key) for text, key in zip(texts, keys, strict=True)]


def source_tensors(sources: list[np.ndarray], vocabulary: int) -> dict[str, Tensor]:
    """`source` int64 [B,S], every row closed by EOS and padded with it, and `source_lengths` [B]."""
    lengths = torch.tensor([len(ids) + 1 for ids in sources], dtype=torch.int64)
    source = torch.full((len(sources), int(lengths.max()) if len(sources) else 1), eos(vocabulary))
    for row, ids in enumerate(sources):
        source[row, : len(ids)] = torch.from_numpy(ids)
    return {"source": source, "source_lengths": lengths}


def chosen(lines: list[dict[str, Any]], count: int) -> dict[int, str]:
    """The sentences whose attention is kept, by id, and why: the first, those with the lowest score, the longest."""
    reasons: dict[int, str] = {}
    orders = {
        "first": lines,
        "worst": sorted(lines, key=lambda line: line["score"]),
        "longest": sorted(lines, key=lambda line: -line["source_tokens"]),
    }
    for reason, order in orders.items():
        for line in order[:count]:
            reasons.setdefault(line["id"], reason)
    return reasons


def pieces(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Each token as text."""
    return [tokenizer.decode([token]) for token in tokens]
