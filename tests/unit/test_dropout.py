"""Dropout: masks have the right rate, and depend on a row's place in the global batch alone."""

import pytest
import torch

from unroll.layers.dropout import Dropout, WeightDropout, WordDropout, draw_integers, draw_mask, dropout_place

CPU = torch.device("cpu")


def mask(shape: tuple[int, ...], p: float, rows: bool = True) -> torch.Tensor:
    return draw_mask(shape, p, rows, CPU, torch.float64)


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.65, 0.999])
@pytest.mark.parametrize("rows", [True, False])
def test_rate_and_scale_are_those_asked_for(p: float, rows: bool) -> None:
    """A user's p = 0.5 drops one half, and what is kept makes up for it."""
    with dropout_place(3, 7, 0, 64):
        drawn = mask((64, 50, 101), p, rows)
    dropped = (drawn == 0).double().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / drawn.numel()) ** 0.5 + 1e-5
    assert len(drawn.unique()) == 2
    assert drawn.max().item() == pytest.approx(1 / (1 - p), rel=1e-2 if p > 0.99 else 1e-4)


def test_every_row_column_and_quarter_of_a_word_is_dropped_alike() -> None:
    """No unit is dropped more often than another: the four 16-bit parts of a random word are equally good."""
    with dropout_place(1, 1, 0, 400):
        drawn = (mask((400, 400), 0.3) == 0).double()
    bound = 5 * (0.3 * 0.7 / 400) ** 0.5
    assert (drawn.mean(0) - 0.3).abs().max() < bound
    assert (drawn.mean(1) - 0.3).abs().max() < bound
    for quarter in range(4):
        assert abs(drawn[:, quarter::4].mean() - 0.3) < 0.01


def test_masks_of_rows_steps_calls_and_seeds_are_unrelated() -> None:
    """Two masks drawn for different things agree as often as chance has it: no unit is dropped in step with another."""

    def drawn(seed: int, step: int, first_row: int, calls: int = 1) -> torch.Tensor:
        with dropout_place(seed, step, first_row, 10):
            return [mask((1, 40_000), 0.5) == 0 for _ in range(calls)][-1].double()

    different = [drawn(1, 1, 0), drawn(1, 1, 1), drawn(1, 2, 0), drawn(2, 1, 0), drawn(1, 1, 0, calls=2)]
    agreement = torch.corrcoef(torch.cat(different)) - torch.eye(len(different))
    assert agreement.abs().max() < 0.025
    neighbours = torch.cat([different[0][:, :-9], different[0][:, 1:-8], different[0][:, 4:-5], different[0][:, 8:-1]])
    assert (torch.corrcoef(neighbours) - torch.eye(4)).abs().max() < 0.025


def test_masks_do_not_depend_on_workers_accumulation_or_padding() -> None:
    """Eight rows on one worker drop what pieces of them drop elsewhere; padding to the right changes nothing."""
    with dropout_place(5, 11, 0, 8):
        whole = [mask((8, 6, 5), 0.4), mask((8, 1, 7), 0.4), mask((9, 4), 0.4, rows=False)]
    for first, count in [(0, 3), (3, 5), (7, 1)]:
        with dropout_place(5, 11, first, 8):
            part = [mask((count, 4, 5), 0.4), mask((count, 1, 7), 0.4), mask((9, 4), 0.4, rows=False)]
        assert torch.equal(part[0], whole[0][first : first + count, :4])
        assert torch.equal(part[1], whole[1][first : first + count])
        assert torch.equal(part[2], whole[2])


def test_integers_are_uniform_and_depend_neither_on_workers_nor_on_padding() -> None:
    with dropout_place(1, 7, 0, 400):
        whole = draw_integers((400, 50), 5, CPU)
    with dropout_place(1, 7, 150, 400):
        part = draw_integers((100, 30), 5, CPU)
    assert torch.equal(part, whole[150:250, :30])
    shares = torch.bincount(whole.flatten(), minlength=5) / whole.numel()
    assert len(shares) == 5
    assert torch.allclose(shares, torch.full((5,), 0.2), atol=0.02)


def test_a_step_draws_the_same_masks_when_it_is_run_again() -> None:
    """A resumed run repeats the masks of an undisturbed one whatever torch's generator has done meanwhile."""

    def run() -> torch.Tensor:
        with dropout_place(5, 11, 2, 8):
            return torch.stack([mask((3, 20), 0.5), mask((3, 20), 0.5)])

    first = run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)


@pytest.mark.parametrize("keyed", [True, False])
def test_without_a_key_masks_come_from_the_generator_of_the_process(keyed: bool) -> None:
    """`keyed=False` gives every process masks of its own; torch.manual_seed makes them repeatable."""

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with dropout_place(5, 11, 0, 8, keyed=keyed):
            return mask((8, 40), 0.5)

    assert torch.equal(run(1), run(1))
    assert torch.equal(run(1), run(2)) == keyed


def test_the_place_ends_with_its_block() -> None:
    """A validation after a training step is not given the step's masks."""
    with dropout_place(1, 1, 0, 2):
        mask((2, 8), 0.5)
    torch.manual_seed(0)
    first = mask((2, 64), 0.5)
    assert not torch.equal(first, mask((2, 64), 0.5))


def test_more_rows_than_the_global_batch_are_refused() -> None:
    """A wrong place would silently give rows the masks of others."""
    with dropout_place(1, 1, 6, 8), pytest.raises(ValueError, match="rows 6 to 9 of a global batch of 8"):
        mask((3, 4), 0.5)


def test_dropout_drops_in_training_alone_and_scales_the_gradient_alike() -> None:
    """The factor of an element is the same forward and backward; a trained model is not thinned out."""
    layer, inputs = Dropout(0.5), torch.ones(4, 9, 6, requires_grad=True)
    outputs = layer(inputs)
    outputs.sum().backward()
    assert inputs.grad is not None
    assert set(outputs.unique().tolist()) == {0.0, 2.0}
    assert torch.equal(inputs.grad, outputs.detach())
    assert layer.eval()(inputs) is inputs


def test_shared_over_time_drops_a_unit_at_all_steps() -> None:
    """Variational dropout: one mask for the window, another for each row."""
    outputs = Dropout(0.5, shared_over_time=True)(torch.ones(4, 9, 60))
    assert torch.equal(outputs, outputs[:, :1].expand_as(outputs))
    assert not torch.equal(outputs[0], outputs[1])
    plain = Dropout(0.5)(torch.ones(4, 9, 60))
    assert not torch.equal(plain, plain[:, :1].expand_as(plain))


def test_weight_dropout_drops_entries_and_lets_gradients_through() -> None:
    """Weight drop leaves the parameter itself whole, and a dropped entry gets no gradient."""
    weight = torch.nn.Parameter(torch.ones(30, 20))
    dropped = WeightDropout(0.5)(weight)
    dropped.sum().backward()
    assert set(dropped.unique().tolist()) == {0.0, 2.0}
    assert weight.min() == 1
    assert weight.grad is not None
    assert torch.equal(weight.grad, dropped.detach())


def test_word_dropout_drops_every_occurrence_of_a_word() -> None:
    """A dropped word is gone from the whole batch, as if its row of the embedding matrix were zero."""
    tokens = torch.randint(50, (7, 40))
    kept = WordDropout(0.5, 50)(torch.ones(7, 40, 3), tokens)[..., 0]
    for word in tokens.unique():
        assert len(kept[tokens == word].unique()) == 1
    assert 0.2 < (kept == 0).double().mean() < 0.8


@pytest.mark.parametrize("p", [-0.1, 1.0, 1.5])
def test_a_probability_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ValueError, match="dropout probability"):
        Dropout(p)


def test_bfloat16_activations_stay_bfloat16() -> None:
    """Under autocast dropout must not widen the stream of activations: half of the speed would be lost."""
    assert Dropout(0.5)(torch.ones(2, 3, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
