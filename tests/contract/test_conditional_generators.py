"""What every conditional generator must keep: padding, batch, chunks and steps change nothing; the future is not seen."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import unroll.models
from unroll.config import check, load_part
from unroll.errors import UserError
from unroll.layers.generator import ConditionalGenerator, bos, eos


def discover() -> list[tuple[str, int]]:
    """(file name, number of a tiny configuration) of every model that has an encoder."""
    files = sorted(Path(unroll.models.__path__[0]).glob("[!_]*.py"))
    models = {path.stem: importlib.import_module(f"unroll.models.{path.stem}") for path in files}
    kept = {name: part for name, part in models.items() if issubclass(part.Model, ConditionalGenerator)}
    return [(name, n) for name, part in kept.items() for n in range(len(part.TINY))]


CASES = discover()
VOCABULARY = {"source": 13, "target": 13}
SOURCES = [[3, 1, 4, 1, 5, 12], [9, 2, 12], [6, 12], [5, 3, 5, 8, 9, 7, 9, 12]]
TARGETS = [[2, 7, 1], [8, 2, 8, 1, 8, 2], [8], [4, 5, 9, 0]]


def build(name: str, number: int) -> Any:
    module = load_part("models", name, "test")
    torch.manual_seed(5)
    model = module.Model(check(module.Config, module.TINY[number], "test"), VOCABULARY).double()
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.6, 0.6)
    return model.eval()


def sources(model: Any, rows: list[int], padding: int = 0) -> dict[str, Tensor]:
    """Inputs of the kind that the model reads; what is padded holds anything."""
    return {"text": texts, "image": images, "frames": clips}[model.reads](rows, padding)


def texts(rows: list[int], padding: int) -> dict[str, Tensor]:
    lengths = torch.tensor([len(SOURCES[row]) for row in rows])
    tensor = torch.randint(0, 13, (len(rows), int(lengths.max()) + padding))
    for place, row in enumerate(rows):
        tensor[place, : len(SOURCES[row])] = torch.tensor(SOURCES[row])
    return {"source": tensor, "source_lengths": lengths}


def images(rows: list[int], padding: int) -> dict[str, Tensor]:
    pictures = torch.randint(0, 256, (4, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    return {"image": pictures[rows]}


def clips(rows: list[int], padding: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shown = torch.randint(0, 256, (4, 4, 16, 16, 3), dtype=torch.uint8, generator=generator)
    counts = torch.tensor([(3, 1, 2, 4)[row] for row in rows])
    frames = torch.randint(0, 256, (len(rows), int(counts.max()) + padding, 16, 16, 3), dtype=torch.uint8)
    for place, row in enumerate(rows):
        frames[place, : counts[place]] = shown[row, : counts[place]]
    return {"frames": frames, "frame_counts": counts}


def targets(rows: list[int]) -> Tensor:
    longest = max(len(TARGETS[row]) for row in rows) + 1
    tokens = torch.full((len(rows), longest), bos(13))
    for place, row in enumerate(rows):
        tokens[place, 1 : 1 + len(TARGETS[row])] = torch.tensor(TARGETS[row])
    return tokens


def run(model: Any, rows: list[int], padding: int = 0) -> Tensor:
    memory = model.encode(sources(model, rows, padding))
    return model(targets(rows), memory, model.initial_state(memory)).hidden


@pytest.mark.parametrize(("name", "number"), CASES)
@torch.no_grad()
def test_neither_batch_nor_padding_changes_a_sentence(name: str, number: int) -> None:
    model = build(name, number)
    together = run(model, [0, 1, 2, 3], padding=3)
    for row in range(4):
        alone = run(model, [row])[0]
        torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "number"), CASES)
@torch.no_grad()
def test_one_pass_is_chunks_is_step_by_step(name: str, number: int) -> None:
    model, rows = build(name, number), [0, 1, 3]
    memory, tokens = model.encode(sources(model, rows)), targets(rows)
    whole = model(tokens, memory, model.initial_state(memory))
    expected = model.output.log_probabilities(whole.hidden)
    state, steps = model.initial_state(memory), []
    for column in tokens.unbind(1):
        log_probabilities, state, attention = model.step(column, memory, state)
        steps.append(log_probabilities)
        assert torch.isneginf(log_probabilities[:, bos(13)]).all()
        if attention is not None:
            torch.testing.assert_close(attention, whole.attention[:, len(steps) - 1])
    found = torch.stack(steps, 1)
    keep = [symbol for symbol in range(13) if symbol != bos(13)]
    torch.testing.assert_close(found[..., keep], expected[..., keep])
    state, chunks = model.initial_state(memory), []
    for chunk in tokens.split(3, 1):
        output = model(chunk, memory, state)
        state = output.state
        chunks.append(output.hidden)
    torch.testing.assert_close(torch.cat(chunks, 1), whole.hidden)


@pytest.mark.parametrize(("name", "number"), CASES)
@torch.no_grad()
def test_several_hypotheses_share_a_memory(name: str, number: int) -> None:
    model, rows = build(name, number), [0, 1]
    memory = model.encode(sources(model, rows))
    twice = model.encode(sources(model, [0, 0, 1, 1]))
    state = {key: value.repeat_interleave(2, 0) for key, value in model.initial_state(memory).items()}
    tokens = torch.tensor([[11, 3], [11, 4], [11, 5], [11, 6]])
    shared = model(tokens, memory, state)
    alone = model(tokens, twice, model.initial_state(twice))
    torch.testing.assert_close(shared.hidden, alone.hidden)
    if shared.attention is not None:
        torch.testing.assert_close(shared.attention, alone.attention)


@pytest.mark.parametrize(("name", "number"), CASES)
def test_the_future_and_other_sentences_are_not_seen(name: str, number: int) -> None:
    model = build(name, number)
    memory = model.encode(sources(model, [0, 1]))
    embedded: list[Tensor] = []
    handle = model.embed_target.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    hidden = model(targets([0, 1]), memory, model.initial_state(memory)).hidden
    handle.remove()
    [gradient] = torch.autograd.grad(hidden[0, 2].sum(), embedded[-1], allow_unused=True)
    assert gradient[0, :3].abs().sum() > 0
    assert not gradient[0, 3:].any()
    assert not gradient[1].any()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_attention_sums_to_one_over_the_source_alone(name: str, number: int) -> None:
    model = build(name, number)
    memory = model.encode(sources(model, [0, 2], padding=2))
    attention = model(targets([0, 2]), memory, model.initial_state(memory)).attention
    if attention is None:
        assert "keys" not in memory
        return
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention.sum(-1)))
    for row, length in enumerate(memory["mask"].sum(1).tolist()):
        assert not attention[row, :, length:].any()


@pytest.mark.parametrize(("name", "number"), CASES)
def test_every_parameter_learns(name: str, number: int) -> None:
    model, rows = build(name, number).train(), [0, 1, 2, 3]
    memory = model.encode(sources(model, rows))
    output = model(targets(rows), memory, model.initial_state(memory))
    wanted = torch.randint(0, 12, output.hidden.shape[:2]).flatten()
    loss = model.output.total_log_loss(output.hidden.flatten(0, 1), wanted, 0.1)
    sum((extra.sum() for extra in output.extras.values()), loss).backward()
    tuned = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.requires_grad}
    idle = [key for key, gradient in tuned.items() if gradient is None or not gradient.any()]
    assert not idle


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decoder_cell": "lru", "attention": "none"}, "lru has no hidden vector to start from the source"),
        ({"decoder_cell": "nmt"}, "did you mean 'ntm'"),
        ({"decoder_cell": "ntm", "decoder_options": {"slot": 3}}, "slot"),
        ({"decoder_options": {"slots": 3}}, "decoder_options: belong to a decoder_cell"),
    ],
)
def test_a_decoder_cell_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    module = load_part("models", "seq2seq", "test")
    with pytest.raises(UserError, match=message):
        module.Model(check(module.Config, {"embedding": 5, "width": 4, **options}, "test"), VOCABULARY)


def test_specials_stand_on_top() -> None:
    assert (bos(13), eos(13)) == (11, 12)
