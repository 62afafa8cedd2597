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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from unroll.config import Recipe, Strict, Training, check
from unroll.data.loader import MASKED, Batch, SampleLoader
from unroll.data.plan import SamplePlan, sample_key
from unroll.data.shards import SampleReader, load_manifest
from unroll.data.tokenizers import SubwordSampler, Tokenizer
from unroll.data.tokenizers import load as load_tokenizer
from unroll.decoding.beam import BeamOptions, beam_search
from unroll.decoding.conditional import Hypothesis, LengthOptions, greedy
from unroll.errors import UserError
from unroll.layers.dropout import draw_mask
from unroll.layers.generator import bos, eos
from unroll.losses.sequence import SequenceObjective, candidate_scores, candidates, sequence_loss
from unroll.progress import progress
from unroll.tasks.base import Loss, State
from unroll.training.context import WorkerContext

WINDOW_SHARDS = 8


class Objective(Strict):
    """What training minimises and on what. `label_smoothing`: see `layers/softmax.py`. `subword_dropout`: probability
    that a merge of the BPE is left out. `validation`: what is scored on the validation split, the mean log-loss of a
    token or -BLEU of greedy translations. `scheduled_sampling` (Bengio et al. 2015, arXiv:1506.03099): probability that
    the model is given its own guess in place of a true token; in the parallel form (Duckworth et al. 2019, 1906.04331):
    the guesses are drawn after a first pass over the true tokens. `sequence`: a loss over whole candidates."""

    label_smoothing: float = Field(0.0, ge=0.0, lt=1.0)
    subword_dropout: float = Field(0.0, ge=0.0, lt=1.0)
    scheduled_sampling: float = Field(0.0, ge=0.0, lt=1.0)
    sequence: SequenceObjective | None = None
    validation: Literal["loss", "bleu"] = "loss"

    @model_validator(mode="after")
    def known_reward(self) -> Self:
        if self.sequence is not None and self.sequence.reward != "bleu":
            raise ValueError(f"sequence.reward: found {self.sequence.reward!r}, translation knows bleu")
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


class Task:
    """Translation on prepared pairs."""

    def __init__(self, recipe: Recipe, folder: Path) -> None:
        self.recipe, self.folder = recipe, folder
        self.manifest = load_manifest(folder)
        if "source_vocabulary" not in self.manifest:
            raise UserError(f"{folder / 'manifest.json'}: no pairs of texts; translation needs a preparer of pairs")
        self.vocabulary = {"source": self.manifest["source_vocabulary"], "target": self.manifest["vocabulary"]}
        kept = ("lowercase", "source_language", "target_language")
        self.description = {"text": {key: self.manifest.get(key) for key in kept}}

    # --- training ---------------------------------------------------------------------------------------------------

    @property
    def training(self) -> Training:
        assert isinstance(self.recipe.train, Training)
        return self.recipe.train

    @cached_property
    def objective(self) -> Objective:
        options: Objective = check(Objective, self.training.objective, f"recipes.{self.recipe.name}.train.objective")
        return options

    @property
    def validation_score(self) -> str:
        """What `validate` gives: lower is better."""
        return "loss" if self.objective.validation == "loss" else "minus_bleu"

    def plan(self, split: str, seed: int, collate: Collate | None = None) -> tuple[SampleReader, SamplePlan]:
        """Which pairs form step n. A `collate` that draws subwords says how long the pairs are in each epoch."""
        tokens = self.training.batch_tokens
        if tokens is None:
            raise UserError(f"recipes.{self.recipe.name}.train.batch_tokens: missing; pairs are batched by tokens")
        reader = SampleReader(self.folder, split)

        def drawn_lengths(shard: int, epoch: int) -> np.ndarray:
            assert collate is not None
            pairs = [(reader.sample(shard, i), sample_key(epoch, shard, i)) for i in range(reader.shard_counts[shard])]
            sides = [
                [len(ids) + 1 for ids in collate.ids(side, *map(list, zip(*pairs, strict=True)))] for side in (1, 0)
            ]
            return np.array(sides, np.int64).T  # [samples,2]

        lengths = drawn_lengths if collate and collate.samplers else reader.lengths
        return reader, SamplePlan(reader.shard_counts, lengths, tokens, WINDOW_SHARDS, seed)

    def total_steps(self, seed: int) -> int:
        """Number of updates of the whole run."""
        if self.training.steps is not None:
            return self.training.steps
        assert self.training.epochs is not None
        if self.objective.subword_dropout:
            place = f"recipes.{self.recipe.name}.train"
            raise UserError(f"{place}.epochs: with subword_dropout every epoch has other batches; state steps instead")
        _, plan = self.plan("train", seed)
        return sum(len(plan.batches(window)) for window in range(self.training.epochs * plan.windows_per_epoch))

    def loader(self, seed: int, context: WorkerContext, position: dict[str, int] | None) -> SampleLoader:
        """The batches of this worker from `position` on, for ever: one list a step, one batch for each pass."""
        collate = Collate(self.folder, self.manifest, self.objective.subword_dropout, seed)
        reader, plan = self.plan("train", seed, collate)
        accumulation = passes(self.training, context)
        return SampleLoader(reader, plan, collate, context.rank, context.size, accumulation, position)

    def loss(self, model: Any, batch: Batch, carry: State | None) -> Loss:
        """Log-loss of one batch, a sum in nats; nothing is carried."""
        tensors, options = batch.tensors, self.objective
        memory = model.encode(tensors)
        tokens = tensors["tokens"]  # [B,T]
        if model.training and options.scheduled_sampling:
            tokens = mixed_with_guesses(model, tensors, options.scheduled_sampling)
        output = model(tokens, memory, model.initial_state(memory))
        hidden, targets = output.hidden.flatten(0, 1), tensors["targets"].flatten()  # [B*T,D] [B*T]
        total = model.output.total_log_loss(hidden, targets, options.label_smoothing if model.training else 0.0)
        if model.training and options.sequence:
            share = options.sequence.token_weight
            total = share * total + (1 - share) * self.sequence_loss(model, tensors, memory, options.sequence)
        return Loss(total, total.detach(), None)

    def sequence_loss(
        self, model: Any, tensors: dict[str, Tensor], memory: State, options: SequenceObjective
    ) -> Tensor:
        """Loss over candidate translations, each sentence counted as often as it has target tokens: a sum."""
        model.eval()
        with torch.no_grad():
            found = candidates(model, model.encode(tensors), options)  # [B*K,T]
        model.train()
        costs = self.costs(found, tensors["targets"])  # [B,K]
        losses = sequence_loss(candidate_scores(model, memory, found), costs, options)  # [B]
        return (losses * (tensors["targets"] >= 0).sum(1)).sum()

    def costs(self, candidates: Tensor, targets: Tensor) -> Tensor:
        """1 - BLEU (add-one smoothed, Lin & Och 2004) of candidates [B*K,T] against targets [B,T'], as texts: [B,K]."""
        from sacrebleu import BLEU

        metric = BLEU(effective_order=True, smooth_method="add-k", smooth_value=1, lowercase=self.manifest["lowercase"])
        last = eos(self.vocabulary["target"])
        references = [self.text([t for t in row if t not in (MASKED, last)]) for row in targets.tolist()]
        texts = [self.text([t for t in row if t not in (MASKED, last)]) for row in candidates.tolist()]
        count = len(texts) // len(references)
        scores = [metric.sentence_score(text, [references[i // count]]).score for i, text in enumerate(texts)]
        return 1 - torch.tensor(scores).view(-1, count).to(targets.device) / 100

    @torch.no_grad()
    def validate(self, model: Any, context: WorkerContext) -> float:
        """Nats per target token on the validation split, or -BLEU of its greedy translations."""
        if self.objective.validation == "bleu":
            [score] = context.sum([-self.greedy_bleu(model, context.device) if context.is_first else 0.0])
            return score
        reader, plan = self.plan("validation", 0)
        collate, parts = Collate(self.folder, self.manifest), self.training.parts
        sums = [[0.0, 0.0] for _ in range(context.passes(parts))]
        steps = sum(len(plan.batches(window)) for window in range(plan.windows_per_epoch))
        with SampleLoader(reader, plan, collate, context.rank, context.size, len(sums)) as loader:
            for _, batches in zip(range(steps), loader, strict=False):
                for total, batch in zip(sums, batches, strict=True):
                    if batch.weight:
                        total[0] += float(self.loss(model, batch.to(context.device), None).total)
                        total[1] += batch.weight
        nats, weight = context.sum_of_slices(sums, parts)
        return nats / weight

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

    @cached_property
    def target_tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.folder / self.manifest["tokenizer"])

    def text(self, tokens: list[int]) -> str:
        """The sentence of target tokens."""
        return self.target_tokenizer.decode(tokens).strip()

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


def mixed_with_guesses(model: Any, tensors: dict[str, Tensor], probability: float) -> Tensor:
    """The tokens [B,T] that the model is given, some of them drawn from what it predicts after the true ones."""
    tokens = tensors["tokens"]
    with torch.no_grad():
        memory = model.encode(tensors)
        hidden = model(tokens, memory, model.initial_state(memory)).hidden
        scores = model.output.log_probabilities(hidden)[..., : bos(model.vocabulary)]  # [B,T,V-2]
        noise = -torch.empty_like(scores).exponential_().log()  # Gumbel: the largest sum is a draw
        guesses = (scores + noise).argmax(-1)  # [B,T]
    given = torch.cat([tokens[:, :1], guesses[:, :-1]], 1)
    true = draw_mask(tokens.shape, probability, True, tokens.device, torch.float32) > 0
    true[:, 0] = True
    return torch.where(true, tokens, given)


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


def target_tensors(targets: list[np.ndarray], vocabulary: int) -> dict[str, Tensor]:
    """`tokens` int64 [B,T], opened by BOS, and `targets` [B,T], closed by EOS and padded with -1."""
    longest = max((len(ids) for ids in targets), default=0) + 1
    tokens = torch.full((len(targets), longest), bos(vocabulary))
    wanted = torch.full((len(targets), longest), MASKED)
    for row, ids in enumerate(targets):
        tokens[row, 1 : len(ids) + 1] = torch.from_numpy(ids)
        wanted[row, : len(ids)] = torch.from_numpy(ids)
        wanted[row, len(ids)] = eos(vocabulary)
    return {"tokens": tokens, "targets": wanted}


def passes(train: Training, context: WorkerContext) -> int:
    """In how many passes a worker goes through its share of a global batch."""
    assert train.batch_tokens is not None
    if train.tokens_per_pass is None:
        return context.passes(train.parts)
    return -(-train.batch_tokens // (context.size * train.tokens_per_pass))


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


def attends(memory: State) -> bool:
    """Whether the model, or one of an ensemble, has attention over this memory."""
    return any(name == "keys" or name.endswith(".keys") for name in memory)
