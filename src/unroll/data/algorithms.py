"""Generated algorithmic tasks: batches of any size out of nothing but numbers, made as whole arrays with NumPy.

An operation (`OPERATIONS`, one class each) says what one sequence looks like: the form of its inputs and targets, the
sizes that a sequence may have, and how a batch of one size is drawn. Everything in a batch has one size, so nothing is
padded. Letters: B rows, T time, D input width, G targets at a time step, L items.

Training (`GeneratedPlan`): step n of seed s is drawn from the generator of (s, n), the whole global batch at once, of
which ranks take rows; so the order is the same for any number of workers and one integer says where to resume.
Fixed sets (`fixed_batches`): drawn from a seed of their own, every size equally often; the manifest holds their SHA-256.

Sources: copy, repeat copy, associative recall, dynamic n-grams, priority sort (Graves et al. 2014, arXiv:1410.5401,
section 4), parity, logic, addition (Graves 2016, arXiv:1603.08983, section 3), adding problem, copy memory (Hochreiter &
Schmidhuber 1997; Arjovsky et al. 2016, arXiv:1511.06464). The differences are said at each operation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import numpy as np
from pydantic import Field, model_validator

from unroll.config import Strict, check, nearest
from unroll.errors import UserError

Size = tuple[int, ...]
ROWS_AT_ONCE = 200
"""Rows of one batch of a fixed set."""


@dataclass(frozen=True)
class Form:
    """What a model reads and what it predicts: `inputs` numbers a time step, and `groups` targets of one kind.

    kind: "bits" (0 or 1, one output each), "classes" (a number below `classes`, one output for each class), "numbers"
    (one output each, squared error).
    """

    inputs: int
    kind: Literal["bits", "classes", "numbers"]
    groups: int = 1
    classes: int = 1

    @property
    def outputs(self) -> int:
        return self.groups * self.classes


@dataclass
class Drawn:
    """inputs float32 [B,T,D]; targets float32 or, for classes, int64 [B,T,G]; mask bool [T] where they count;
    difficulty float32 [B,T]: how much there is to compute, in the operation's own measure."""

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray
    difficulty: np.ndarray


class Operation(Strict):
    """Base of the operations; the fields are the options of a data set."""

    @property
    def form(self) -> Form:
        raise NotImplementedError

    def sizes(self) -> list[Size]:
        """Every size that a sequence may have, all equally likely; the first number is what lengths are counted in."""
        raise NotImplementedError

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        """A batch of one size."""
        raise NotImplementedError


class _Lengths(Operation):
    """Sequences of `shortest` to `longest` vectors of `bits` random bits."""

    shortest: int = Field(1, ge=1)
    longest: int = Field(20, ge=1, le=2000)
    bits: int = Field(8, ge=1, le=64)

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest}, above longest, {self.longest}")
        return self

    def sizes(self) -> list[Size]:
        return [(length,) for length in range(self.shortest, self.longest + 1)]


class Copy(_Lengths):
    """L vectors, a mark on a channel of its own, then the vectors are to be given again. T = 2 L + 1."""

    backwards: ClassVar[bool] = False

    @property
    def form(self) -> Form:
        return Form(self.bits + 1, "bits", self.bits)

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [length] = size
        vectors = _bits(generator, rows, length, self.bits)
        inputs, targets, mask = _blank(rows, 2 * length + 1, self.form)
        inputs[:, :length, : self.bits] = vectors
        inputs[:, length, self.bits] = 1
        targets[:, length + 1 :] = vectors[:, ::-1] if self.backwards else vectors
        mask[length + 1 :] = True
        return Drawn(inputs, targets, mask, _constant(length, inputs))


class Reverse(Copy):
    """Copy, last vector first."""

    backwards: ClassVar[bool] = True


class RepeatCopy(_Lengths):
    """L vectors, a mark whose height is the normalised number of repeats, then the vectors that often and an end mark.

    T = L + 1 + repeats L + 1. The number is scaled to mean 0 and deviation 1 over `fewest`..`most`.
    """

    longest: int = Field(10, ge=1, le=200)
    fewest: int = Field(1, ge=1)
    most: int = Field(10, ge=1, le=200)
    normalised_over: tuple[int, int] = (1, 10)

    @model_validator(mode="after")
    def repeats_in_order(self) -> Self:
        if self.fewest > self.most or self.normalised_over[0] > self.normalised_over[1]:
            raise ValueError(
                f"repeats from {self.fewest} to {self.most}, normalised over {self.normalised_over}: no range"
            )
        return self

    @property
    def form(self) -> Form:
        return Form(self.bits + 2, "bits", self.bits + 1)

    def sizes(self) -> list[Size]:
        lengths = range(self.shortest, self.longest + 1)
        return [(length, repeats) for length in lengths for repeats in range(self.fewest, self.most + 1)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        length, repeats = size
        vectors = _bits(generator, rows, length, self.bits)
        inputs, targets, mask = _blank(rows, length + 1 + repeats * length + 1, self.form)
        inputs[:, :length, : self.bits] = vectors
        inputs[:, length, self.bits] = 1
        usual = np.arange(self.normalised_over[0], self.normalised_over[1] + 1)
        inputs[:, length, self.bits + 1] = (repeats - usual.mean()) / max(1e-6, float(usual.std()))
        targets[:, length + 1 : -1, : self.bits] = np.tile(vectors, (1, repeats, 1))
        targets[:, -1, self.bits] = 1
        mask[length + 1 :] = True
        return Drawn(inputs, targets, mask, _constant(length * repeats, inputs))


class AssociativeRecall(Operation):
    """Items of `vectors` vectors, a mark before each; then one of them between marks of another kind: give the next item.

    T = items (1 + vectors) + (vectors + 2) + vectors.
    """

    fewest: int = Field(2, ge=2)
    most: int = Field(6, ge=2, le=200)
    vectors: int = Field(3, ge=1, le=50)
    bits: int = Field(6, ge=1, le=64)

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if self.fewest > self.most:
            raise ValueError(f"fewest is {self.fewest}, above most, {self.most}")
        return self

    @property
    def form(self) -> Form:
        return Form(self.bits + 2, "bits", self.bits)

    def sizes(self) -> list[Size]:
        return [(items,) for items in range(self.fewest, self.most + 1)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [items] = size
        count, bits = self.vectors, self.bits
        content = _bits(generator, rows, items * count, bits).reshape(rows, items, count, bits)
        asked = generator.integers(0, items - 1, rows)
        shown = items * (1 + count)
        inputs, targets, mask = _blank(rows, shown + 2 * count + 2, self.form)
        slots = inputs[:, :shown].reshape(rows, items, 1 + count, -1)
        slots[:, :, 0, bits] = 1
        slots[:, :, 1:, :bits] = content
        inputs[:, :shown] = slots.reshape(rows, shown, -1)
        inputs[:, [shown, shown + count + 1], bits + 1] = 1
        inputs[:, shown + 1 : shown + 1 + count, :bits] = content[np.arange(rows), asked]
        targets[:, -count:] = content[np.arange(rows), asked + 1]
        mask[-count:] = True
        return Drawn(inputs, targets, mask, _constant(items, inputs))


class DynamicNgrams(Operation):
    """A row of bits in which each depends on the `order` - 1 before it, by a table that is drawn anew for every row from
    Beta(1/2, 1/2): predict every next bit. The first context is random."""

    order: int = Field(6, ge=1, le=12)
    length: int = Field(200, ge=1, le=5000)

    @property
    def form(self) -> Form:
        return Form(1, "bits", 1)

    def sizes(self) -> list[Size]:
        return [(self.length,)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [length] = size
        contexts = 2 ** (self.order - 1)
        table = generator.beta(0.5, 0.5, (rows, contexts))
        context, draws = generator.integers(0, contexts, rows), generator.random((length, rows))
        bits = np.empty((length + 1, rows), np.float32)
        bits[0] = context & 1
        for t in range(length):
            bits[t + 1] = draws[t] < table[np.arange(rows), context]
            context = (2 * context + bits[t + 1].astype(np.int64)) % contexts
        bits = bits.T
        mask = np.ones(length, bool)
        inputs = np.ascontiguousarray(bits[:, :-1, None])
        return Drawn(inputs, np.ascontiguousarray(bits[:, 1:, None]), mask, _constant(self.order, inputs))


class PrioritySort(_Lengths):
    """L vectors, each with a priority from -1 to 1 on a channel of its own; then the `kept` share of highest priority, from
    the highest down. T = L + 1 + kept L.

    near: the share of priorities that lie within `within` of another's. With none, two of 20 that are to be given one
    after the other are nearer than a thousandth in one list of seven: nothing else is hard, and little is learnt about it.
    """

    shortest: int = Field(20, ge=1)
    kept: float = Field(0.8, gt=0.0, le=1.0)
    near: float = Field(0.0, ge=0.0, le=1.0)
    within: float = Field(0.02, gt=0.0, le=1.0)

    @property
    def form(self) -> Form:
        return Form(self.bits + 2, "bits", self.bits)

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [length] = size
        kept = max(1, round(self.kept * length))
        vectors, priorities = _bits(generator, rows, length, self.bits), generator.uniform(-1, 1, (rows, length))
        if self.near and length > 1:
            others = (np.arange(length) + generator.integers(1, length, (rows, length))) % length
            moved = np.take_along_axis(priorities, others, axis=1) + self.within * generator.uniform(
                -1, 1, (rows, length)
            )
            priorities = np.where(generator.random((rows, length)) < self.near, moved.clip(-1, 1), priorities)
        inputs, targets, mask = _blank(rows, length + 1 + kept, self.form)
        inputs[:, :length, : self.bits] = vectors
        inputs[:, :length, self.bits] = priorities
        inputs[:, length, self.bits + 1] = 1
        order = np.argsort(-priorities, axis=1, kind="stable")[:, :kept]
        targets[:, length + 1 :] = np.take_along_axis(vectors, order[:, :, None], axis=1)
        mask[length + 1 :] = True
        return Drawn(inputs, targets, mask, _constant(length, inputs))


class AddingProblem(Operation):
    """`length` pairs of a number in [0, 1) and a mark; one mark in each half: the sum of the two marked numbers, at the
    end. Saying 1 always has a mean squared error of 1/6."""

    length: int = Field(600, ge=2, le=10_000)

    @property
    def form(self) -> Form:
        return Form(2, "numbers", 1)

    def sizes(self) -> list[Size]:
        return [(self.length,)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [length] = size
        inputs, targets, mask = _blank(rows, length, self.form)
        inputs[:, :, 0] = generator.random((rows, length), np.float32)
        marks = np.stack([generator.integers(0, length // 2, rows), generator.integers(length // 2, length, rows)], 1)
        np.put_along_axis(inputs[:, :, 1], marks, 1, axis=1)
        targets[:, -1, 0] = np.take_along_axis(inputs[:, :, 0], marks, axis=1).sum(1)
        mask[-1] = True
        return Drawn(inputs, targets, mask, _constant(length, inputs))


class CopyMemory(Operation):
    """`symbols` symbols of an alphabet, `blanks` - 1 blanks, a mark, as many blanks: blanks are to be said until the mark
    has passed, then the symbols. T = blanks + 2 symbols.

    All blank, then any symbol, has a mean loss of symbols ln(alphabet) / T: 0.0204 for 10 of 8 after 1,000.
    """

    symbols: int = Field(10, ge=1, le=100)
    alphabet: int = Field(8, ge=2, le=100)
    blanks: int = Field(1000, ge=1, le=2000)

    @property
    def form(self) -> Form:
        return Form(self.alphabet + 2, "classes", 1, self.alphabet + 1)

    def sizes(self) -> list[Size]:
        return [(self.blanks,)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [blanks] = size
        count, blank = self.symbols, self.alphabet
        shown = generator.integers(0, self.alphabet, (rows, count))
        given = np.full((rows, blanks + 2 * count), blank)
        given[:, :count] = shown
        given[:, blanks + count - 1] = blank + 1
        targets = np.full((rows, blanks + 2 * count, 1), blank)
        targets[:, -count:, 0] = shown
        inputs = np.eye(self.form.inputs, dtype=np.float32)[given]
        return Drawn(inputs, targets, np.ones(given.shape[1], bool), _constant(blanks, inputs))


class Parity(Operation):
    """One vector of `width` numbers: the first n are -1 or 1, the rest 0, with n uniform from 1 on: is the number of ones
    odd? Difficulty: n. There are 2^(width + 1) - 2 vectors, so few of a small width that test vectors were trained on."""

    width: int = Field(16, ge=1, le=256)
    fewest: int = Field(1, ge=1)

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if self.fewest > self.width:
            raise ValueError(f"fewest is {self.fewest}, above width, {self.width}")
        return self

    @property
    def form(self) -> Form:
        return Form(self.width, "bits", 1)

    def sizes(self) -> list[Size]:
        return [(1,)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        used = generator.integers(self.fewest, self.width + 1, rows)
        signs = generator.integers(0, 2, (rows, self.width)) * 2 - 1
        signs *= np.arange(self.width) < used[:, None]
        odd = (signs == 1).sum(1) % 2
        inputs, targets = signs.astype(np.float32)[:, None], odd.astype(np.float32)[:, None, None]
        return Drawn(inputs, targets, np.ones(1, bool), used.astype(np.float32)[:, None])


class Logic(Operation):
    """At each time step two bits and a chain of one-hot gates: the value of the chain. After the first step the first of
    the two bits is 0 and the value before stands in for it. Difficulty: gates of the step.

    Gates, chained as in the paper (b_{i+1} = gate_i(b_i, b_{i-1})): nor, x and not y, y and not x, xor, nand, and, xnor,
    x or not y, y or not x, or.
    """

    shortest: int = Field(1, ge=1)
    longest: int = Field(10, ge=1, le=500)
    gates: int = Field(10, ge=1, le=50)

    @model_validator(mode="after")
    def in_order(self) -> Self:
        if self.shortest > self.longest:
            raise ValueError(f"shortest is {self.shortest}, above longest, {self.longest}")
        return self

    @property
    def form(self) -> Form:
        return Form(2 + 10 * self.gates, "bits", 1)

    def sizes(self) -> list[Size]:
        return [(length,) for length in range(self.shortest, self.longest + 1)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [length] = size
        inputs, targets, mask = _blank(rows, length, self.form)
        used = generator.integers(1, self.gates + 1, (rows, length))
        gates = generator.integers(0, 10, (rows, length, self.gates))
        bits = generator.integers(0, 2, (rows, length, 2))
        bits[:, 1:, 0] = 0
        active = np.arange(self.gates) < used[..., None]  # [B,T,gates]
        inputs[..., :2] = bits
        inputs[..., 2:] = (np.eye(10, dtype=np.float32)[gates] * active[..., None]).reshape(rows, length, -1)
        value = bits[:, 0, 0]
        for t in range(length):
            before, last = value, bits[:, t, 1]
            for gate in range(self.gates):
                result = GATES[gates[:, t, gate], last, before]
                before, last = (
                    np.where(active[:, t, gate], last, before),
                    np.where(active[:, t, gate], result, last),
                )
            value = last
            targets[:, t, 0] = value
        mask[:] = True
        return Drawn(inputs, targets, mask, used.astype(np.float32))


GATES = np.array(
    [[[1, 0], [0, 0]], [[0, 0], [1, 0]], [[0, 1], [0, 0]], [[0, 1], [1, 0]], [[1, 1], [1, 0]],
     [[0, 0], [0, 1]], [[1, 0], [0, 1]], [[1, 0], [1, 1]], [[1, 1], [0, 1]], [[0, 1], [1, 1]]]
)  # fmt: skip
"""[gate, x, y] in the order of `Logic`."""


class Addition(Operation):
    """`numbers` numbers of 1 to `digits` decimal digits, one a time step, each digit one-hot, the highest first; at each
    step the sum of all so far, digit by digit, the last one first, the class 10 where it has no more. Difficulty: digits.
    """

    numbers: int = Field(5, ge=1, le=50)
    digits: int = Field(5, ge=1, le=15)

    @property
    def form(self) -> Form:
        return Form(10 * self.digits, "classes", self._places, 11)

    @property
    def _places(self) -> int:
        return len(str(self.numbers * (10**self.digits - 1)))

    def sizes(self) -> list[Size]:
        return [(self.numbers,)]

    def draw(self, generator: np.random.Generator, rows: int, size: Size) -> Drawn:
        [length] = size
        lengths = generator.integers(1, self.digits + 1, (rows, length))
        digits = generator.integers(0, 10, (rows, length, self.digits))
        present = np.arange(self.digits) < lengths[..., None]  # [B,T,digits]
        weights = np.where(present, 10 ** np.maximum(lengths[..., None] - 1 - np.arange(self.digits), 0), 0)
        sums = (digits * weights).sum(-1).cumsum(1)  # [B,T]
        powers = 10 ** np.arange(self._places)
        targets = np.where(sums[..., None] >= np.maximum(powers, 1), sums[..., None] // powers % 10, 10)
        targets[..., 0] = sums % 10
        inputs = (np.eye(10, dtype=np.float32)[digits] * present[..., None]).reshape(rows, length, -1)
        return Drawn(inputs, targets, np.ones(length, bool), lengths.astype(np.float32))


OPERATIONS: dict[str, type[Operation]] = {
    "copy": Copy,
    "repeat_copy": RepeatCopy,
    "associative_recall": AssociativeRecall,
    "dynamic_ngrams": DynamicNgrams,
    "priority_sort": PrioritySort,
    "reverse": Reverse,
    "adding_problem": AddingProblem,
    "copy_memory": CopyMemory,
    "parity": Parity,
    "logic": Logic,
    "addition": Addition,
}


def operation_of(name: object, options: Mapping[str, Any], place: str) -> Operation:
    """The operation called `name` with its options.

    Raises:
        UserError: an unknown operation or option, or a value that makes no sense.
    """
    if name not in OPERATIONS:
        raise UserError(f"{place}.operation: no operation {name!r}{nearest(str(name), list(OPERATIONS))}")
    found: Operation = check(OPERATIONS[str(name)], options, f"{place}.{name}")
    return found


class GeneratedPlan:
    """The global batches of `rows` rows that a seed gives, by the number of the step."""

    def __init__(self, operation: Operation, rows: int, seed: int) -> None:
        self.operation, self.rows, self.seed = operation, rows, seed
        self.sizes = operation.sizes()

    def batch(self, step: int) -> Drawn:
        """The global batch of a step."""
        generator = np.random.default_rng([self.seed, step])
        return self.operation.draw(generator, self.rows, self.sizes[int(generator.integers(len(self.sizes)))])


def fixed_batches(operation: Operation, samples: int, seed: int, split: str) -> Iterator[tuple[Size, Drawn]]:
    """A fixed set in batches of one size each: every size gets its equal share of the samples, the first ones one more."""
    sizes = operation.sizes()
    salt = int.from_bytes(hashlib.sha256(split.encode()).digest()[:8], "little")
    for number, size in enumerate(sizes):
        rows = samples // len(sizes) + (number < samples % len(sizes))
        for part, start in enumerate(range(0, rows, ROWS_AT_ONCE)):
            generator = np.random.default_rng([seed, salt, number, part])
            yield size, operation.draw(generator, min(ROWS_AT_ONCE, rows - start), size)


def fixed_hash(operation: Operation, samples: int, seed: int, split: str) -> str:
    """SHA-256 of all arrays of a fixed set: NumPy may one day draw other numbers from the same seed."""
    digest = hashlib.sha256()
    for _, drawn in fixed_batches(operation, samples, seed, split):
        for array in (drawn.inputs, drawn.targets, drawn.mask):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _bits(generator: np.random.Generator, rows: int, length: int, bits: int) -> np.ndarray:
    """Random bits float32 [B,L,bits], 64 of them from each random word."""
    count = rows * length * bits
    words = generator.integers(0, 2**64, -(-count // 64), dtype=np.uint64)
    return np.unpackbits(words.view(np.uint8))[:count].reshape(rows, length, bits).astype(np.float32)


def _blank(rows: int, steps: int, form: Form) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs [B,T,D] and targets [B,T,G] of zeros, mask [T] of nothing."""
    inputs = np.zeros((rows, steps, form.inputs), np.float32)
    return inputs, np.zeros((rows, steps, form.groups), np.float32), np.zeros(steps, bool)


def _constant(value: float, inputs: np.ndarray) -> np.ndarray:
    """The same difficulty [B,T] everywhere."""
    return np.full(inputs.shape[:2], value, np.float32)
