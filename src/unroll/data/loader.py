"""Batches in the order of a plan, read ahead in the background.

An item of a loader is a list of `Batch`, one for each pass over the rows that this rank takes of one global batch
(`plan.rank_rows`). Iteration never ends: epochs follow each other, and `Batch.position` says where to resume after it.
Starting at a position costs nothing that grows with it.
"""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from unroll.data.plan import SamplePlan, StreamPlan, rank_rows, sample_key
from unroll.data.shards import SampleReader, TokenStream

MASKED = -1
BUFFER_TOKENS = 2**19


@dataclass
class Batch:
    """The rows that one pass works on.

    tensors: for streams `tokens` and `targets`, both int64 [B,T], targets -1 where nothing is to be predicted;
        for samples what the task's `collate` makes of them.
    weight: number of targets (of samples, if there is no tensor `targets`); 0 for a rank without rows.
    first_row, total_rows: where the rows stand in the global batch.
    position: JSON; where to resume after this batch.
    description: names the rows in error messages.
    window_scale: length of this window / the plan's window, for random windows.
    starts_epoch: no state is carried into this batch.
    """

    tensors: dict[str, Tensor]
    weight: float
    first_row: int
    total_rows: int
    position: dict[str, int]
    description: str
    window_scale: float = 1.0
    starts_epoch: bool = False

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}
        return replace(self, tensors=moved)


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class _Prefetched:
    """Runs a producer in one daemon thread, at most `prefetch` items ahead; its exceptions reach the consumer.

    `waited` is the time in seconds that the consumer stood waiting for data.
    """

    def __init__(self, prefetch: int) -> None:
        self.waited = 0.0
        self._items: queue.Queue[list[Batch] | _Failure] = queue.Queue(max(1, prefetch))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="unroll-loader", daemon=True)

    def _produce(self) -> Iterator[list[Batch]]:
        raise NotImplementedError

    def _run(self) -> None:
        try:
            for item in self._produce():
                if not self._put(item):
                    return
        except BaseException as error:  # noqa: BLE001 - handed on, not swallowed
            self._put(_Failure(error))

    def _put(self, item: list[Batch] | _Failure) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> list[Batch]:
        if self._stop.is_set():
            raise StopIteration
        if self._thread.ident is None:
            self._thread.start()
        began = time.perf_counter()
        item = self._items.get()
        self.waited += time.perf_counter() - began
        if isinstance(item, _Failure):
            self.close()
            raise item.error
        return item

    def close(self) -> None:
        """End the thread; the loader gives nothing more."""
        self._stop.set()
        with contextlib.suppress(queue.Empty):  # makes room, so that the thread does not wait for it
            while True:
                self._items.get_nowait()
        if self._thread.ident is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StreamLoader(_Prefetched):
    """Windows of a stream, one item a step. `position`: {"epoch", "step"} of the first item.

    `row_slices`: the rows of the global batch for each pass of this rank. Each row keeps a read-ahead buffer, so that
    the reads of a lane are long and one after the other; all buffers together hold `BUFFER_TOKENS` ids.
    """

    def __init__(
        self,
        stream: TokenStream,
        plan: StreamPlan,
        row_slices: list[slice],
        position: dict[str, int] | None = None,
        prefetch: int = 2,
    ) -> None:
        super().__init__(prefetch)
        self.stream, self.plan, self.row_slices = stream, plan, row_slices
        self.position = position or {"epoch": 0, "step": 0}
        self._lanes = [lane for rows in row_slices for lane in range(rows.start, rows.stop)]
        self._ahead = max(BUFFER_TOKENS // max(1, len(self._lanes)), plan.window_tokens)
        self._lane_lengths = np.array([plan.lane(lane)[1] for lane in self._lanes], np.int64)
        self._buffer = np.zeros((len(self._lanes), 0), np.int64)
        self._buffer_start = 0

    def _produce(self) -> Iterator[list[Batch]]:
        epoch, step = self.position["epoch"], self.position["step"]
        while True:
            steps = self.plan.steps(epoch)
            for current in range(step, steps):
                following = (epoch, current + 1) if current + 1 < steps else (epoch + 1, 0)
                yield self._step(epoch, current, {"epoch": following[0], "step": following[1]})
            epoch, step = epoch + 1, 0

    def _step(self, epoch: int, step: int, position: dict[str, int]) -> list[Batch]:
        offset, length = self.plan.window(epoch, step)
        ids = self._read(offset, length + 1)  # [B,T+1]
        targets = ids[:, 1:].copy()  # [B,T]
        targets[offset + np.arange(length) >= self._lane_lengths[:, None]] = MASKED
        batches, first = [], 0
        for rows in self.row_slices:
            own = slice(first, first + rows.stop - rows.start)
            first = own.stop
            tensors = {
                "tokens": torch.from_numpy(ids[own, :-1].copy()),
                "targets": torch.from_numpy(targets[own]),
            }
            batches.append(
                Batch(
                    tensors=tensors,
                    weight=float((targets[own] != MASKED).sum()),
                    first_row=rows.start,
                    total_rows=self.plan.lanes,
                    position=position,
                    description=f"epoch {epoch} step {step} of split {self.stream.split}: rows {rows.start} to "
                    f"{rows.stop - 1}, tokens {offset} to {offset + length} of each",
                    window_scale=length / self.plan.window_tokens,
                    starts_epoch=step == 0,
                )
            )
        return batches

    def _read(self, offset: int, count: int) -> np.ndarray:
        """Ids `offset` .. `offset + count - 1` of every lane of this rank: int64 [B, count]; 0 after the corpus."""
        if not self._buffer_start <= offset <= offset + count <= self._buffer_start + self._buffer.shape[1]:
            size = max(count, min(self._ahead, self.plan.longest_lane + 1 - offset))
            self._buffer = np.zeros((len(self._lanes), size), np.int64)
            self._buffer_start = offset
            for row, lane in enumerate(self._lanes):
                start = self.plan.lane(lane)[0] + offset
                available = max(0, min(size, self.stream.tokens - start))
                if available:
                    self._buffer[row, :available] = self.stream.read(start, available)
        first = offset - self._buffer_start
        return self._buffer[:, first : first + count]


Collate = Callable[[list[dict[str, Any]], list[int]], dict[str, Tensor]]


class SampleLoader(_Prefetched):
    """Batches of samples, one item a global batch. `position`: {"window", "batch"} of the first item.

    `collate(samples, keys)` makes the tensors of a list of samples (also of none, when a rank has no rows); a key names
    a sample in an epoch and seeds whatever is random in it. It runs in `workers` threads, which help where it leaves
    Python (decoding images and sound), and in one thread for 0. The batches are the same for any number of workers.
    """

    def __init__(
        self,
        reader: SampleReader,
        plan: SamplePlan,
        collate: Collate,
        rank: int = 0,
        world: int = 1,
        accumulation: int = 1,
        position: dict[str, int] | None = None,
        workers: int = 0,
        prefetch: int = 2,
    ) -> None:
        super().__init__(prefetch)
        self.reader, self.plan, self.collate = reader, plan, collate
        self.rank, self.world, self.accumulation = rank, world, accumulation
        self.position = position or {"window": 0, "batch": 0}
        self.workers = workers
        reader.keep = max(reader.keep, plan.window_shards + 1)

    def _order(self) -> Iterator[tuple[int, np.ndarray, str, dict[str, int]]]:
        """(epoch, rows of the global batch, its name, position after it) from the starting position on, for ever."""
        window, batch = self.position["window"], self.position["batch"]
        while True:
            batches = self.plan.batches(window)
            for current in range(batch, len(batches)):
                following = (window, current + 1) if current + 1 < len(batches) else (window + 1, 0)
                name = f"window {window} batch {current} of split {self.reader.split}"
                position = {"window": following[0], "batch": following[1]}
                yield self.plan.epoch(window), batches[current], name, position
            window, batch = window + 1, 0

    def _produce(self) -> Iterator[list[Batch]]:
        if self.workers == 0:
            for place in self._order():
                yield self._step(*place)
            return
        pending: deque[Future[list[Batch]]] = deque()
        with ThreadPoolExecutor(self.workers, "unroll-decode") as pool:
            for place in self._order():
                pending.append(pool.submit(self._step, *place))
                if len(pending) > self.workers:
                    yield pending.popleft().result()

    def _step(self, epoch: int, rows: np.ndarray, name: str, position: dict[str, int]) -> list[Batch]:
        batches = []
        for micro in range(self.accumulation):
            own = rank_rows(len(rows), self.rank, self.world, micro, self.accumulation)
            places = rows[own].tolist()
            keys = [sample_key(epoch, shard, index) for shard, index in places]
            tensors = self.collate([self.reader.sample(shard, index) for shard, index in places], keys)
            targets = tensors.get("targets")
            batches.append(
                Batch(
                    tensors=tensors,
                    weight=float(len(places) if targets is None else (targets != MASKED).sum()),
                    first_row=own.start,
                    total_rows=len(rows),
                    position=position,
                    description=f"{name}: (shard, sample) {', '.join(f'({s}, {i})' for s, i in places)}",
                )
            )
        return batches


class GeneratedLoader(_Prefetched):
    """Batches that are made from the number of the step, one item a step. `position`: {"step"} of the first item.

    `make(step)` gives the tensors of the global batch and `weigh(tensors)` the weight of any rows of it.
    `row_slices`: the rows of the global batch for each pass of this rank. Every rank makes the whole batch, which costs
    less than it would to say which part of the random numbers is whose.
    """

    def __init__(
        self,
        make: Callable[[int], dict[str, Tensor]],
        weigh: Callable[[dict[str, Tensor]], float],
        row_slices: list[slice],
        position: dict[str, int] | None = None,
        prefetch: int = 4,
    ) -> None:
        super().__init__(prefetch)
        self.make, self.weigh, self.row_slices = make, weigh, row_slices
        self.position = position or {"step": 0}

    def _produce(self) -> Iterator[list[Batch]]:
        for step in itertools.count(self.position["step"]):
            whole = self.make(step)
            yield [self._part(whole, rows, step) for rows in self.row_slices]

    def _part(self, whole: dict[str, Tensor], rows: slice, step: int) -> Batch:
        tensors = {name: tensor[rows] for name, tensor in whole.items()}
        return Batch(
            tensors=tensors,
            weight=self.weigh(tensors),
            first_row=rows.start,
            total_rows=len(next(iter(whole.values()))),
            position={"step": step + 1},
            description=f"rows {rows.start} to {rows.stop - 1} of the batch generated for step {step}",
        )


@dataclass
class Segment:
    """A window of evaluation. `tokens`, `targets` int64 [B,T]; `mask` bool [B,T] is true where a target counts;
    `positions` int64 [B,T] is the place of each target in its split; `first` is true where a group of parts begins
    and the state has to be fresh."""

    tokens: Tensor
    targets: Tensor
    mask: Tensor
    positions: Tensor
    first: bool


def segments(
    stream: TokenStream,
    window: int,
    parts: int = 1,
    rows: int | None = None,
    context: int = 1,
    preceding: TokenStream | None = None,
) -> Iterator[Segment]:
    """Read a split once for evaluation, in `parts` contiguous parts fixed by the recipe, `rows` of them at a time.

    Each part is preceded by `context` tokens that are read but not scored, so the scores depend on `parts` and
    `context` but not on `rows` or `window`. They come from before the part: for the first one from the end of
    `preceding`; without it the first token of the split has nothing before it and is not scored. `parts=1` reads the
    split as one stream.
    """
    first_target = 0 if preceding else 1
    cuts = [first_target + part * (stream.tokens - first_target) // parts for part in range(parts + 1)]
    earliest = -preceding.tokens if preceding else 0
    lanes = [(max(start - context, earliest), start, end) for start, end in itertools.pairwise(cuts)]
    for group in range(0, parts, rows or parts):
        yield from _read_parts(stream, preceding, lanes[group : group + (rows or parts)], window)


def _read_parts(
    stream: TokenStream, preceding: TokenStream | None, lanes: list[tuple[int, int, int]], window: int
) -> Iterator[Segment]:
    """`lanes`: (first token read, first target scored, end) of each row; places below 0 lie in `preceding`."""
    longest = max(end - begin - 1 for begin, _, end in lanes)
    for offset in range(0, longest, window):
        length = min(window, longest - offset)
        ids = np.zeros((len(lanes), length + 1), np.int64)
        begins = np.array([begin for begin, _, _ in lanes])
        positions = begins[:, None] + offset + 1 + np.arange(length)  # [B,T]
        for row, (begin, _, end) in enumerate(lanes):
            start, stop = begin + offset, min(begin + offset + length + 1, end)
            if start < stop:
                ids[row, : stop - start] = _read_across(stream, preceding, start, stop)
        scored = np.array([[start, end] for _, start, end in lanes])
        mask = (positions >= scored[:, :1]) & (positions < scored[:, 1:])
        targets = np.where(mask, ids[:, 1:], MASKED)
        yield Segment(
            torch.from_numpy(ids[:, :-1].copy()),
            torch.from_numpy(targets),
            torch.from_numpy(mask),
            torch.from_numpy(positions),
            offset == 0,
        )


def _read_across(stream: TokenStream, preceding: TokenStream | None, start: int, stop: int) -> np.ndarray:
    """Ids `start` .. `stop - 1` of the split, negative places counting back from the end of `preceding`."""
    before = np.empty(0, np.int64)
    if start < 0 and preceding:
        before = preceding.read(preceding.tokens + start, min(stop, 0) - start)
    return np.concatenate([before, stream.read(max(start, 0), max(stop, 0) - max(start, 0))])
