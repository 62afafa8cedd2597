"""The n-gram model against its definition written with dictionaries, and the promises of every causal model."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from unroll.config import check
from unroll.errors import UserError
from unroll.models import ngram
from unroll.models.ngram import Config, Model

SMOOTHINGS = [
    {"smoothing": "maximum_likelihood"},
    {"smoothing": "maximum_likelihood", "floor": 0.1},
    {"smoothing": "kneser_ney"},
    {"smoothing": "kneser_ney", "discount": None},
    {"smoothing": "modified_kneser_ney"},
]


def plain_ngram(text: list[int], config: Config, vocabulary: int) -> Callable[[list[int], int], float]:
    """p(symbol | history) straight from the equations, with dictionaries of tuples."""
    n, modified = config.order, config.smoothing == "modified_kneser_ney"
    grams = [Counter(tuple(text[i : i + k]) for i in range(len(text) - k + 1)) for k in range(1, n + 1)]
    if config.smoothing != "maximum_likelihood":
        grams = [Counter(g[1:] for g in longer) for longer in grams[1:]] + grams[-1:]
    discounts = []
    for counts in grams:
        n1, n2, n3, n4 = (sum(c == i for c in counts.values()) for i in (1, 2, 3, 4))
        if config.smoothing == "maximum_likelihood":
            found = [0.0] * 3
        elif modified:
            y = n1 / (n1 + 2 * n2) if n1 else 0.0
            found = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3] if n1 and n2 and n3 else [0.0]
            found = found if min(found) > 0 else [0.5, 1.0, 1.5]
        else:
            found = [config.discount or (n1 / (n1 + 2 * n2) if n1 else 0.75)] * 3
        discounts.append([0.0, *found])

    def probability(context: tuple[int, ...], symbol: int) -> float:
        counts, discount = grams[len(context)], discounts[len(context)]
        lower = probability(context[1:], symbol) if context else 1 / vocabulary
        seen = {g: c for g, c in counts.items() if g[:-1] == context}
        total = sum(seen.values())
        if not total:
            return lower
        c = seen.get((*context, symbol), 0)
        return (c - discount[min(c, 3)] + sum(discount[min(c, 3)] for c in seen.values()) * lower) / total

    def floored(history: list[int], symbol: int) -> float:
        context = tuple(history[max(0, len(history) - n + 1) :])
        return (1 - config.floor) * probability(context, symbol) + config.floor / vocabulary

    return floored


def random_text(length: int, vocabulary: int, seed: int) -> list[int]:
    """Skewed symbols, so that some contexts are frequent and others are never seen."""
    draws = np.random.default_rng(seed).random(length)
    return [int(x) for x in draws**3 * vocabulary]


def fitted(text: list[int], vocabulary: int, **options: object) -> Model:
    model = Model(Config(**options), vocabulary)  # type: ignore[arg-type]
    model.fit([np.array(text)])
    return model


def stream_loss(model: Model, text: list[int]) -> Tensor:
    """[T-1] nats of one text read as a stream."""
    tokens = torch.tensor([text])
    return model.log_loss(tokens[:, :-1], tokens[:, 1:], model.initial_state(1))[0][0]


@pytest.mark.parametrize("order", range(1, 9))
@pytest.mark.parametrize("options", SMOOTHINGS, ids=str)
def test_loss_equals_the_definition(order: int, options: dict[str, object]) -> None:
    texts = [(random_text(60, 3, 0), 3), (random_text(120, 6, 1), 6), (random_text(12, 4, 2), 4), ([0, 1, 2] * 10, 4)]
    for text, vocabulary in texts:
        unseen = random_text(40, vocabulary, 10)
        model = fitted(text, vocabulary, order=order, **options)
        plain = plain_ngram(text, model.config, vocabulary)
        probabilities = [plain(unseen[:i], unseen[i]) for i in range(1, len(unseen))]
        expected = [-math.log(p) if p > 0 else math.inf for p in probabilities]
        torch.testing.assert_close(stream_loss(model, unseen).tolist(), expected, rtol=1e-12, atol=1e-12)


def test_discounts_are_estimated_and_not_the_fallback() -> None:
    """Guards the test above: with random texts too small, only the fallback would be compared."""
    model = fitted(random_text(3000, 12, 0), 12, order=3, smoothing="modified_kneser_ney")
    found = [model._discounts(counts) for counts in model._smoothed_counts()]
    assert found[-1] != (0.0, 0.5, 1.0, 1.5)
    assert all(0 < d <= i for i, d in enumerate(found[-1][1:], start=1))
    text = random_text(400, 12, 3)
    plain = plain_ngram(random_text(3000, 12, 0), model.config, 12)
    expected = [-math.log(plain(text[:i], text[i])) for i in range(1, len(text))]
    torch.testing.assert_close(stream_loss(model, text).tolist(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 5])
@pytest.mark.parametrize("options", SMOOTHINGS, ids=str)
def test_step_is_a_distribution_and_agrees_with_the_loss(order: int, options: dict[str, object]) -> None:
    model = fitted(random_text(300, 7, 0), 9, order=order, **options)  # symbols 7 and 8 are never seen
    text = torch.tensor([random_text(30, 9, seed) for seed in range(4)])  # [B,T]
    loss, _ = model.log_loss(text[:, :-1], text[:, 1:], model.initial_state(4))
    state = model.initial_state(4)
    for t in range(text.shape[1] - 1):
        log_probabilities, state = model.step(text[:, t], state)
        assert log_probabilities.shape == (4, 9)
        torch.testing.assert_close(log_probabilities.exp().sum(1), torch.ones(4).double(), rtol=0, atol=1e-9)
        expected = -log_probabilities.gather(1, text[:, t + 1 : t + 2])[:, 0]
        torch.testing.assert_close(loss[:, t], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_chunks_give_what_one_pass_gives(order: int) -> None:
    model = fitted(random_text(300, 5, 0), 5, order=order)
    text = torch.tensor([random_text(50, 5, 1), random_text(50, 5, 2)])
    whole, after = model.log_loss(text[:, :-1], text[:, 1:], model.initial_state(2))
    state, parts = model.initial_state(2), []
    for start, stop in ((0, 1), (1, 3), (3, 3), (3, 20), (20, 49)):
        part, state = model.log_loss(text[:, start:stop], text[:, start + 1 : stop + 1], state)
        parts.append(part)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(state["history"], after["history"])
    assert state["history"].shape == (2, order - 1)


def test_a_row_does_not_depend_on_the_rows_beside_it() -> None:
    model = fitted(random_text(300, 5, 0), 5, order=4)
    text = torch.tensor([random_text(30, 5, seed) for seed in range(3)])
    together, _ = model.log_loss(text[:, :-1], text[:, 1:], model.initial_state(3))
    for row in range(3):
        alone, _ = model.log_loss(text[row : row + 1, :-1], text[row : row + 1, 1:], model.initial_state(1))
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_tables_do_not_depend_on_how_the_text_is_cut(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = np.array(random_text(500, 6, 0))
    expected = fitted(text.tolist(), 6, order=5).state_dict()
    monkeypatch.setattr(ngram, "MERGE_TOKENS", 20)  # so that 500 tokens take many merges
    model = Model(Config(order=5), 6)
    seen: list[int] = []

    def chunks() -> Iterator[np.ndarray]:
        buffer = np.empty(size, np.int64)  # one buffer for every chunk, as a reader may have
        for start in range(0, len(text), size):
            part = buffer[: len(text[start : start + size])]
            part[:] = text[start : start + size]
            yield part
        yield buffer[:0]

    model.fit(chunks(), seen.append)
    assert seen[-1] == 500
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(table, expected[name]) for name, table in model.state_dict().items())


def test_masked_targets_cost_nothing_and_change_nothing() -> None:
    model = fitted(random_text(300, 5, 0), 5, order=3)
    text = torch.tensor([random_text(20, 5, 1)])
    targets = text[:, 1:].clone()
    targets[0, 3::2] = -1
    loss, _ = model.log_loss(text[:, :-1], targets, model.initial_state(1))
    expected = torch.where(targets[0] < 0, 0.0, stream_loss(model, text[0].tolist()))
    assert torch.equal(loss[0], expected)


def test_a_padded_token_ends_the_context() -> None:
    """The lanes of a batch may be shorter than the batch: what stands in the gap must not look like another symbol."""
    model = fitted(random_text(300, 5, 0), 5, order=4)
    text = random_text(20, 5, 1)
    loss, _ = model.log_loss(
        torch.tensor([[4, 4, -1, *text[:-1]]]), torch.tensor([[4, -1, -1, *text[1:]]]), model.initial_state(1)
    )
    assert torch.equal(loss[0, 3:], stream_loss(model, text))


def test_maximum_likelihood_says_infinite_and_leaves_unseen_contexts_to_shorter_ones() -> None:
    text = [0, 1, 0, 1, 0, 2]
    model = fitted(text, 4, order=2, smoothing="maximum_likelihood")
    assert stream_loss(model, [0, 1]).item() == pytest.approx(math.log(3 / 2))
    assert stream_loss(model, [1, 2]).item() == math.inf
    assert stream_loss(model, [3, 2]).item() == pytest.approx(math.log(6)), "3 is an unseen context: p(2) = 1/6"
    assert stream_loss(model, [2, 1]).item() == pytest.approx(math.log(3)), "nothing ever followed 2: p(1) = 2/6"
    floored = fitted(text, 4, order=2, smoothing="maximum_likelihood", floor=0.2)
    assert stream_loss(floored, [1, 2]).item() == pytest.approx(math.log(4 / 0.2))


def test_a_text_shorter_than_the_order_is_counted() -> None:
    model = fitted([1], 3, order=6)
    log_probabilities, _ = model.step(torch.tensor([1]), model.initial_state(1))
    assert log_probabilities.exp().sum().item() == pytest.approx(1.0, abs=1e-12)
    assert model.parameter_count == 1


@pytest.mark.parametrize("options", SMOOTHINGS, ids=str)
def test_saved_tables_give_the_same_losses(options: dict[str, object], tmp_path: Path) -> None:
    model = fitted(random_text(200, 5, 0), 6, order=4, **options)
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    loaded = Model(model.config, 6)
    loaded.load_state_dict(load_file(path))
    text = random_text(100, 6, 1)
    assert torch.equal(stream_loss(loaded, text), stream_loss(model, text))
    assert loaded.parameter_count == model.parameter_count


def test_tables_of_orders_longer_than_the_text_are_saved_too(tmp_path: Path) -> None:
    model = fitted([0, 1], 2, order=4)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = Model(model.config, 2)
    loaded.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(stream_loss(loaded, [0, 1, 1]), stream_loss(model, [0, 1, 1]))


def test_tables_of_another_model_are_refused() -> None:
    tables = fitted(random_text(200, 5, 0), 5, order=3).state_dict()
    with pytest.raises(UserError, match="5 symbols, the vocabulary has 7"):
        Model(Config(order=3), 7).load_state_dict(tables)
    with pytest.raises(UserError, match="order 3, the recipe says 2"):
        Model(Config(order=2), 5).load_state_dict(tables)
    with pytest.raises(UserError, match="not the tables of an n-gram model"):
        Model(Config(order=2), 5).load_state_dict({"embed.weight": torch.zeros(5, 2)})


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("grams_2", lambda table: table.flip(0)),
        ("grams_2", lambda table: table + 10_000),
        ("grams_3", lambda table: table[:-1]),
        ("counts_1", lambda table: table - table),
        ("counts_3", lambda table: table.float()),
    ],
)
def test_damaged_tables_are_refused(name: str, change: Callable[[Tensor], Tensor]) -> None:
    tables = fitted(random_text(200, 5, 0), 5, order=3).state_dict()
    with pytest.raises(UserError, match=f"table {name[-1]} is damaged"):
        Model(Config(order=3), 5).load_state_dict({**tables, name: change(tables[name])})


@pytest.mark.parametrize("chunks", [[], [np.empty(0, np.int64)]])
def test_an_empty_text_is_refused(chunks: list[np.ndarray]) -> None:
    with pytest.raises(UserError, match="the text to count is empty"):
        Model(Config(order=2), 5).fit(chunks)


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(UserError, match="token id 5; ids from 0 to 4"):
        Model(Config(order=2), 5).fit([np.array([0, 5])])
    with pytest.raises(UserError, match="token id -1"):
        Model(Config(order=2), 5).fit([np.array([0, -1])])
    model = fitted([0, 1, 2], 5, order=2)
    with pytest.raises(UserError, match="token id 9"):
        stream_loss(model, [0, 9])


def test_an_unfitted_model_says_so() -> None:
    with pytest.raises(UserError, match="nothing is counted yet"):
        stream_loss(Model(Config(order=2), 5), [0, 1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"order": 9}, "order"),
        ({"order": 2, "smoothing": "good_turing"}, "smoothing"),
        ({"order": 2, "discount": 0.0}, "discount"),
        ({"order": 2, "floor": 0.1}, "floor is for maximum_likelihood"),
        ({"order": 2, "smothing": "kneser_ney"}, "did you mean 'smoothing'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(Config, options, "recipe.model")


def test_sampling_a_counted_cycle_gives_the_cycle() -> None:
    model = fitted([0, 1, 2, 3] * 5, 4, order=2, smoothing="maximum_likelihood")
    token, state, written = torch.tensor([0]), model.initial_state(1), []
    for _ in range(8):
        log_probabilities, state = model.step(token, state)
        token = torch.multinomial(log_probabilities.exp(), 1)[:, 0]
        written.append(token.item())
    assert written == [1, 2, 3, 0, 1, 2, 3, 0]
