"""The loader hands the plan's batches to training. A run that resumes, or runs on other workers, must get the same."""

import itertools
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unroll.data import loader as loader_module
from unroll.data.loader import Batch, SampleLoader, Segment, StreamLoader, segments
from unroll.data.plan import SamplePlan, StreamPlan, rank_rows
from unroll.data.shards import SampleReader, TokenStream, token_type
from unroll.data.writers import SampleWriter, StreamWriter, write_manifest
from unroll.errors import UserError

TOKENS = 997
quick = settings(max_examples=20, deadline=None)


def write_stream(folder: Path, **splits: np.ndarray) -> None:
    summaries = {}
    for split, ids in splits.items():
        with StreamWriter(folder, split, 5000, record_tokens=64, shard_bytes=3000) as writer:
            writer.write(ids)
        summaries[split] = writer.summary
    size = token_type(5000).itemsize
    write_manifest(folder, {"kind": "stream", "token_bytes": size, "record_tokens": 64, "splits": summaries})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token i of the training split is i, and i + 2000 in the validation split, so a batch says what it holds."""
    folder = tmp_path_factory.mktemp("stream")
    write_stream(folder, train=np.arange(TOKENS), validation=np.arange(2000, 2300))
    return folder


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("samples")
    generator = np.random.default_rng(2)
    with SampleWriter(folder, "train", 5000, record_samples=4, shard_bytes=8000) as writer:
        for number in range(90):
            ids = np.full(generator.integers(1, 12), number)
            writer.write({"ids": ids}, len(ids))
    write_manifest(folder, {"kind": "samples", "token_bytes": 2, "splits": {"train": writer.summary}})
    return folder


def plain(batch: Batch) -> tuple[Any, ...]:
    tensors = {name: tensor.tolist() for name, tensor in batch.tensors.items()}
    return tensors, batch.weight, batch.first_row, batch.total_rows, batch.position, batch.description


def take(loader: StreamLoader | SampleLoader, count: int) -> list[list[tuple[Any, ...]]]:
    with loader:
        return [[plain(batch) for batch in item] for item in itertools.islice(loader, count)]


def slices(lanes: int, rank: int, world: int, accumulation: int) -> list[slice]:
    return [rank_rows(lanes, rank, world, micro, accumulation) for micro in range(accumulation)]


@quick
@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 9), st.integers(10, 60), st.booleans())
def test_all_ranks_together_see_every_target_once(
    folder: Path, world: int, accumulation: int, lanes: int, window: int, random_windows: bool
) -> None:
    stream = TokenStream(folder, "train")
    plan = StreamPlan(stream.tokens, lanes, window, seed=1, random_windows=random_windows)
    seen: list[int] = []
    for rank in range(world):
        with StreamLoader(stream, plan, slices(lanes, rank, world, accumulation)) as loader:
            for item in itertools.islice(loader, plan.steps(0)):
                for batch in item:
                    tokens, targets = batch.tensors["tokens"], batch.tensors["targets"]
                    real = targets >= 0
                    assert torch.equal(targets[real], tokens[real] + 1)
                    assert batch.weight == real.sum()
                    seen += targets[real].tolist()
    assert sorted(seen) == list(range(1, TOKENS))


@pytest.mark.parametrize("random_windows", [False, True])
def test_resuming_anywhere_gives_what_would_have_followed(folder: Path, random_windows: bool) -> None:
    stream = TokenStream(folder, "train")
    plan = StreamPlan(stream.tokens, 5, 20, seed=1, random_windows=random_windows)
    rows = slices(5, 0, 1, 2)
    straight = take(StreamLoader(stream, plan, rows), 2 * plan.steps(0) + 3)
    for step, item in enumerate(straight[:-3]):
        position = item[-1][4]
        assert take(StreamLoader(stream, plan, rows, position), 3) == straight[step + 1 : step + 4]


def test_the_size_of_the_buffer_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = TokenStream(folder, "train")
    plan = StreamPlan(stream.tokens, 3, 20, seed=1)
    large = take(StreamLoader(stream, plan, [slice(0, 3)]), 40)
    monkeypatch.setattr(loader_module, "BUFFER_TOKENS", 100)
    assert take(StreamLoader(stream, plan, [slice(0, 3)]), 40) == large


def test_window_scale_is_the_share_of_a_full_window(folder: Path) -> None:
    plan = StreamPlan(TOKENS, 2, 30, seed=1, random_windows=True)
    with StreamLoader(TokenStream(folder, "train"), plan, [slice(0, 2)]) as loader:
        for step, [batch] in enumerate(itertools.islice(loader, 5)):
            assert batch.window_scale == plan.window(0, step)[1] / 30 == batch.tensors["tokens"].shape[1] / 30


def test_an_error_while_reading_ahead_reaches_the_loop(tmp_path: Path) -> None:
    write_stream(tmp_path, train=np.arange(TOKENS))
    stream = TokenStream(tmp_path, "train")
    shard = tmp_path / "train-00001.tar"
    shard.write_bytes(b"\0" * shard.stat().st_size)
    loader = StreamLoader(stream, StreamPlan(stream.tokens, 1, 20, seed=1), [slice(0, 1)])
    with pytest.raises(UserError, match=r"train-00001\.tar: byte 0:"):
        take(loader, 100)


def test_closing_ends_the_thread_and_the_iteration(folder: Path) -> None:
    before = threading.active_count()
    loader = StreamLoader(TokenStream(folder, "train"), StreamPlan(TOKENS, 2, 20, seed=1), [slice(0, 2)])
    next(loader)
    loader.close()
    assert threading.active_count() == before
    assert list(loader) == []
    loader.close()


def collate(samples: list[dict[str, Any]], keys: list[int]) -> dict[str, torch.Tensor]:
    return {"first": torch.tensor([int(sample["ids"][0]) for sample in samples], dtype=torch.int64)}


def sample_loader(folder: Path, **options: Any) -> SampleLoader:
    reader = SampleReader(folder, "train", keep=1)
    plan = SamplePlan(reader.shard_counts, reader.lengths, batch_tokens=40, window_shards=2, seed=4)
    return SampleLoader(reader, plan, collate, **options)


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
def test_samples_are_the_same_with_any_number_of_workers(samples: Path, workers: int) -> None:
    assert take(sample_loader(samples, workers=workers), 40) == take(sample_loader(samples), 40)


@quick
@given(st.integers(1, 8), st.integers(1, 3), st.integers(0, 4))
def test_all_ranks_together_see_every_sample_once(samples: Path, world: int, accumulation: int, workers: int) -> None:
    plan = sample_loader(samples).plan
    steps = sum(len(plan.batches(window)) for window in range(plan.windows_per_epoch))
    seen: list[int] = []
    for rank in range(world):
        loader = sample_loader(samples, rank=rank, world=world, accumulation=accumulation, workers=workers)
        for item in take(loader, steps):
            assert len(item) == accumulation
            for tensors, weight, *_ in item:
                assert weight == len(tensors["first"])
                seen += tensors["first"]
    assert sorted(seen) == list(range(90))


def test_samples_resume_anywhere(samples: Path) -> None:
    straight = take(sample_loader(samples), 45)
    for step in range(0, 42, 5):
        position = straight[step][-1][4]
        assert take(sample_loader(samples, position=position, workers=2), 3) == straight[step + 1 : step + 4]


def scored(parts: Any) -> dict[int, int]:
    """{place of the target: target} over all segments; every target at most once."""
    found: dict[int, int] = {}
    segment: Segment
    for segment in parts:
        assert torch.equal(segment.mask, segment.targets >= 0)
        for place, target in zip(
            segment.positions[segment.mask].tolist(), segment.targets[segment.mask].tolist(), strict=True
        ):
            assert place not in found
            found[place] = target
    return found


@quick
@given(st.integers(1, 7), st.integers(1, 8), st.integers(1, 50), st.integers(1, 40), st.booleans())
def test_evaluation_scores_every_token_once(
    folder: Path, parts: int, rows: int, window: int, context: int, with_preceding: bool
) -> None:
    stream = TokenStream(folder, "validation")
    preceding = TokenStream(folder, "train") if with_preceding else None
    found = scored(segments(stream, window, parts, rows, context, preceding))
    assert found == {place: 2000 + place for place in range(0 if with_preceding else 1, 300)}


def contexts(folder: Path, parts: int, rows: int, window: int, context: int) -> dict[int, list[int]]:
    """What was read in its part before each scored target, by place."""
    stream, preceding = TokenStream(folder, "validation"), TokenStream(folder, "train")
    read: list[list[int]] = []
    result = {}
    for segment in segments(stream, window, parts, rows, context, preceding):
        if segment.first:
            read = [[] for _ in segment.tokens]
        for row, tokens in enumerate(segment.tokens.tolist()):
            for column, token in enumerate(tokens):
                read[row].append(token)
                if segment.mask[row, column]:
                    result[int(segment.positions[row, column])] = list(read[row])
    return result


def test_what_a_token_is_predicted_from_depends_on_parts_and_context_alone(folder: Path) -> None:
    expected = contexts(folder, parts=4, rows=1, window=300, context=30)
    assert contexts(folder, parts=4, rows=3, window=17, context=30) == expected
    assert expected[0] == list(range(TOKENS - 30, TOKENS))
    assert expected[3] == [*range(TOKENS - 30, TOKENS), 2000, 2001, 2002]
    assert expected[75] == list(range(2045, 2075))
    assert len(contexts(folder, 1, 1, 100, 5)[299]) == 304
