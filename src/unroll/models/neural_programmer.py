"""Neural programmer: a network that answers a question by choosing, step by step, operations on a table's columns.

Papers: Neelakantan, Le & Sutskever 2016, arXiv:1511.04834 (sections 2 and 3); Neelakantan et al. 2017, arXiv:1611.08945
(operations on text and order, for real tables). A question LSTM gives Z [S,H] and q; a history RNN h_t remembers what
was chosen. At each of T steps, with a context c_t that attends over Z,

    operation_t = softmax(U tanh(W_o [q; c_t; h_t]))              U o_t: what was chosen
    number_t    = softmax(Z at the numbers (W_n [q; c_t; h_t; U o_t]))      z_t: its state, 0 if o_t compares with none
    column_t    = softmax(names (W_c [q; c'_t; h_t; U o_t; z_t]) + names e_t)
    h_{t+1}     = tanh(W_h [U o_t; z_t; chosen column; h_t])

Rows are selected by r_t [N], at first all of them; v is the table, o, a, b the three choices:

    rows      greater, lesser (..._equal)  r_i c_i, c_i = sum_j a_j sum_k b_k [v_ij > number_k]    or_greater, or_lesser  max(r_i, c_i)
              largest, smallest  sum_j a_j max(0, r_i - sum_k r_k [v_kj > v_ij])     reset      all rows
              first, last, previous, next  of the rows selected, by place            match      r_i sum_j a_j m_ij, the cells that
              frequent  r_i sum_j a_j [cell is as frequent as any in its column]                share words with the question
    numbers   count  sum_i r_i      sum  sum_j a_j sum_i r_i v_ij      difference  of the last two numbers, the earlier one first
    cells     print  a_j r_i

Training computes all of them, weighted by the soft choices; the loss is on what the last step gives. A prediction takes
the largest choice at every step, so that its numbers are exact.

Deliberate differences, for a well-conditioned problem:
- soft choice among the numbers of a question mixes outcomes of comparisons, not the numbers compared with: a mixed pivot
  has no gradient through the comparison and means nothing;
- the number is chosen anew at each step (in 1511.04834 once for each operation), so that one question may compare twice;
- a step that selects no rows leaves the selection as it was, and one that computes no number the numbers;
- comparisons select among the rows selected before, or add to them: `and`, `or` of 1511.04834, which combine the last two
  selections, take three right steps at once before any of them pays; so every step pays by itself;
- operation, column and number are chosen with attention over the question (1611.08945 has it for columns alone);
- the number is chosen for the operation, the column for both (in the papers independently of each other), and the history
  knows the number: which column a step needs depends on what it does with it, so what is learnt of one comparison holds
  for a second one, at whatever step it comes.
The losses are the task's (`tasks/table_questions.py`), and so is the noise on gradients.

Numbers to reach: 99 % of synthetic questions with up to three operations (1511.04834: 99.2 with 5 columns); 34.2 % of
WikiTableQuestions for one model, 37.7 % for fifteen (1611.08945).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from unroll.config import Strict
from unroll.layers.dropout import Dropout
from unroll.layers.recurrent import LSTM

Operation = Literal[
    "count", "sum", "difference", "print", "greater", "lesser", "greater_equal", "lesser_equal", "or_greater", "or_lesser",
    "largest", "smallest", "reset", "first", "last", "previous", "next", "match", "frequent",
]  # fmt: skip
OPERATIONS: list[Operation] = [
    "count", "sum", "difference", "print", "greater", "lesser", "or_greater", "or_lesser", "largest", "smallest", "reset",
]  # fmt: skip
"""Of a table of numbers."""
COMPARISONS = {
    "greater": torch.gt, "lesser": torch.lt, "greater_equal": torch.ge, "lesser_equal": torch.le,
    "or_greater": torch.gt, "or_lesser": torch.lt,
}  # fmt: skip
NUMERIC = ("count", "sum", "difference")
READ_COLUMNS = {*COMPARISONS, "sum", "print", "largest", "smallest", "match", "frequent"}


class Config(Strict):
    """`steps` T of a program; `operations` that it may be made of. `embedding` of words, `width` of both networks."""

    embedding: int = Field(64, ge=1)
    width: int = Field(64, ge=1)
    steps: int = Field(4, ge=1)
    operations: list[Operation] = Field(OPERATIONS, min_length=1)
    dropout: float = Field(0.0, ge=0.0, lt=1.0)


OF_TEXT = [
    "reset", "count", "print", "greater_equal", "lesser_equal", "first", "last", "previous", "next", "match", "frequent",
    "largest", "smallest",
]  # fmt: skip
TINY: list[dict[str, Any]] = [
    {"embedding": 5, "width": 6},
    {"embedding": 4, "width": 5, "steps": 3, "dropout": 0.2, "operations": OF_TEXT},
]
"""Small configurations, at least one for each option: what the contract tests build."""


@dataclass
class Answer:
    """`number` [B] and `cells` [B,N,C], each as far as the last step's operation gives such an answer; the choices of
    each step, `operations` [B,T,O], `columns` [B,T,C], `numbers` [B,T,K]; and `rows` [B,T,N] selected after it. Of drawn
    programs also `log_probability` [B], of what the operations read of them."""

    number: Tensor
    cells: Tensor
    operations: Tensor
    columns: Tensor
    numbers: Tensor
    rows: Tensor
    log_probability: Tensor | None = None


class Model(nn.Module):
    """`vocabulary` words; what a batch holds is said in `tasks/table_questions.py`."""

    def __init__(self, config: Config, vocabulary: int) -> None:
        super().__init__()
        self.names: list[str] = [*config.operations]
        self.steps = config.steps
        width = config.width
        self.embed = nn.Embedding(vocabulary, config.embedding)
        self.dropout = Dropout(config.dropout)
        self.forwards, self.backwards = LSTM(config.embedding, width), LSTM(config.embedding, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.operations = nn.Parameter(torch.randn(len(self.names), width) * width**-0.5)  # U [O,H]
        self.look, self.look_for_column = nn.Linear(3 * width, 2 * width), nn.Linear(6 * width, 2 * width)
        self.choose, self.choose_number = nn.Linear(5 * width, width), nn.Linear(6 * width, 2 * width)
        self.choose_column = nn.Linear(8 * width, config.embedding)
        self.mention = nn.Parameter(torch.ones(()))
        self.history = nn.Linear(4 * width + config.embedding, width)

    def forward(self, batch: dict[str, Tensor], hard: bool = False) -> Answer:
        """Run the T steps on a batch; `hard` takes the largest choice of each step in place of the mixture."""
        return self.run(batch, 1, largest if hard else None)

    def draw(self, batch: dict[str, Tensor], count: int, explore: float) -> Answer:
        """`count` programs drawn for each question, side by side: [B*count,...]. A choice is drawn evenly with a
        probability that each program draws for itself, up to `explore`, else as the model would have it: some programs
        differ in one choice from what the model would do, some in many. Gradients go through `log_probability` alone."""
        even = explore * torch.rand(len(batch["lengths"]), count, 1, device=batch["lengths"].device)  # [B,G,1]
        return self.run(batch, count, lambda logs: drawn(logs, even))

    def run(self, batch: dict[str, Tensor], count: int, pick: Callable[[Tensor], Tensor] | None) -> Answer:
        """The steps of G = `count` programs for each question. `pick` makes one choice of log-probabilities [B,G,O];
        None keeps their mixture."""
        embedded, states, last, names = self.read(batch)  # [B,S,E] [B,S,2H] [B,2H] [B,C,E]
        table = Table(batch, self.names)
        real = torch.arange(embedded.shape[1], device=embedded.device) < batch["lengths"][:, None]  # [B,S]
        at_numbers = states.gather(1, batch["places"][..., None].expand(-1, -1, states.shape[2]))  # [B,K,2H]
        allowed = {"columns": batch["column_mask"][:, None], "numbers": batch["number_mask"][:, None]}
        last = last[:, None].expand(-1, count, -1)  # [B,G,2H]
        history = self.start.expand(len(embedded), count, -1)  # [B,G,H]
        every = table.every[:, None].expand(-1, count, -1)  # [B,G,N]
        rows, nothing = every, every.new_zeros(every.shape[:2])  # [B,G,N] [B,G]
        numbers = (nothing, nothing)  # the last two, the earlier one first
        chosen: dict[str, list[Tensor]] = {"operations": [], "columns": [], "numbers": [], "rows": []}
        likely = embedded.new_zeros(every.shape[:2])  # [B,G]
        for _ in range(self.steps):
            place = torch.cat([last, history], -1)  # [B,G,3H]
            context = attend(self.look(place), states, states, real)  # [B,G,2H]
            wide = torch.cat([place, context], -1)  # [B,G,5H]
            asked = self.dropout(torch.tanh(self.choose(wide)))  # [B,G,H]
            logs = {"operations": log_shares(F.linear(asked, self.operations), None)}  # [B,G,O]
            operation = choice(logs["operations"], None, pick)
            done = operation @ self.operations  # [B,G,H]
            wanted = self.choose_number(torch.cat([wide, done], -1))  # [B,G,2H]
            logs["numbers"] = log_shares(wanted @ at_numbers.mT, allowed["numbers"])  # [B,G,K]
            number = choice(logs["numbers"], allowed["numbers"], pick)
            pointed = number @ at_numbers * self.share(operation, COMPARISONS)[..., None]  # [B,G,2H]
            place = torch.cat([place, done, pointed], -1)  # [B,G,6H]
            looked = attend(self.look_for_column(place), states, torch.cat([states, embedded], -1), real)
            context, mentioned = looked.split([states.shape[2], embedded.shape[2]], -1)  # [B,G,2H] [B,G,E]
            wanted = self.choose_column(torch.cat([place, context], -1)) + self.mention * mentioned  # [B,G,E]
            scores = wanted @ names.mT + self.mention * batch["column_matches"][:, None]  # [B,G,C]
            logs["columns"] = log_shares(scores, allowed["columns"])
            column = choice(logs["columns"], allowed["columns"], pick)
            taken = {"operations": operation, "columns": column, "numbers": number}
            likely = likely + self.read_by(logs, taken)
            printed = rows
            outcome, rows, numbers = table.apply(operation, column, number, rows, numbers, self.names)
            for name, value in {**taken, "rows": rows}.items():
                chosen[name].append(value.flatten(0, 1))
            told = torch.cat([done, pointed, column @ names, asked], -1)  # [B,G,4H+E]
            history = torch.tanh(self.history(told))  # [B,G,H]
        cells = table.printed(operation, column, printed, self.names)  # [B,G,N,C]
        together = {name: torch.stack(values, 1) for name, values in chosen.items()}
        return Answer(outcome.flatten(), cells.flatten(0, 1), **together, log_probability=likely)

    def read_by(self, logs: dict[str, Tensor], taken: dict[str, Tensor]) -> Tensor:
        """Log-probability [B,G] of what was chosen in one step, of column and number where the operation reads them."""
        operation = taken["operations"]
        likely = (logs["operations"] * operation).sum(-1)
        for name, reading in (("columns", READ_COLUMNS), ("numbers", COMPARISONS)):
            likely = likely + (logs[name] * taken[name]).sum(-1) * self.share(operation, reading)
        return likely

    def share(self, operation: Tensor, some: Collection[str]) -> Tensor:
        """How much of the choices [B,G,O] is among some operations: [B,G]."""
        return operation @ torch.tensor(
            [float(name in some) for name in self.names], dtype=operation.dtype, device=operation.device
        )

    def read(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The words' embeddings [B,S,E], states [B,S,2H] of both directions, the last ones [B,2H], names [B,C,E]."""
        embedded = self.dropout(self.embed(batch["question"]))
        count, longest = batch["question"].shape
        real = torch.arange(longest, device=embedded.device) < batch["lengths"][:, None]  # [B,S]
        ahead, after = self.forwards(embedded, self.forwards.initial_state(count), mask=real)
        back, before = self.backwards(embedded.flip(1), self.backwards.initial_state(count), mask=real.flip(1))
        states = torch.cat([ahead, back.flip(1)], -1)  # [B,S,2H]
        return embedded, states, torch.cat([after["hidden"], before["hidden"]], -1), self.column_names(batch)

    def column_names(self, batch: dict[str, Tensor]) -> Tensor:
        """The mean embedding of each column's words: names [B,C,W] (-1 where there is none) -> [B,C,E]."""
        words = batch["names"] >= 0  # [B,C,W]
        embedded = self.embed(batch["names"].clamp_min(0)) * words[..., None]
        return embedded.sum(2) / words.sum(2, keepdim=True).clamp_min(1)


def attend(query: Tensor, keys: Tensor, values: Tensor, real: Tensor) -> Tensor:
    """What the words that queries [B,G,H] ask for say: softmax over keys [B,S,H], of values [B,S,E]."""
    scores = (query @ keys.mT).masked_fill(~real[:, None], -torch.inf)  # [B,G,S]
    return scores.softmax(-1) @ values


def log_shares(scores: Tensor, allowed: Tensor | None) -> Tensor:
    """Log-softmax [B,G,O] over what is allowed."""
    if allowed is not None:
        scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min / 2)
    return scores.log_softmax(-1)


def choice(logs: Tensor, allowed: Tensor | None, pick: Callable[[Tensor], Tensor] | None) -> Tensor:
    """Shares [B,G,O], soft or 1 at what is picked; zeros where nothing is allowed."""
    shares = logs.exp() if pick is None else pick(logs)
    return shares if allowed is None else shares * allowed


def largest(logs: Tensor) -> Tensor:
    """1 at the largest of [B,G,O]."""
    return F.one_hot(logs.argmax(-1), logs.shape[-1]).to(logs.dtype)


def drawn(logs: Tensor, explore: Tensor) -> Tensor:
    """1 at one of [B,G,O], drawn by its probability, or with probability `explore` [B,G,1] evenly of all that is possible."""
    with torch.no_grad():
        possible = logs > torch.finfo(logs.dtype).min / 4  # [B,G,O]
        even = possible / possible.sum(-1, keepdim=True).clamp_min(1)
        shares = (1 - explore) * logs.exp() + explore * even
        place = torch.multinomial(shares.flatten(0, -2), 1).view(logs.shape[:-1])  # [B,G]
        return F.one_hot(place, logs.shape[-1]).to(logs.dtype)


class Table:
    """What operations need of a batch of tables, computed once for all steps."""

    def __init__(self, batch: dict[str, Tensor], operations: list[str]) -> None:
        self.values, self.numeric = batch["values"], batch["numeric"]  # [B,N,C]
        self.every = batch["row_mask"].to(self.values.dtype)  # [B,N]
        pivots = batch["numbers"][:, :, None, None]  # [B,K,1,1]
        numeric, dtype = self.numeric[:, None], self.values.dtype
        self.holds = {
            name: (compare(self.values[:, None], pivots) & numeric).to(dtype)  # [B,K,N,C]
            for name, compare in COMPARISONS.items()
            if name in operations
        }
        self.matches, self.frequent = batch["matches"].to(dtype), batch["frequent"].to(dtype)  # [B,N,C]
        if "largest" in operations or "smallest" in operations:
            both = self.numeric[:, :, None] & self.numeric[:, None]  # [B,N,N,C]
            above = (self.values[:, :, None] > self.values[:, None]) & both
            self.beaten = {"largest": above.to(dtype), "smallest": above.transpose(1, 2).to(dtype)}  # [B,k,i,C]

    def apply(
        self,
        operation: Tensor,
        column: Tensor,
        number: Tensor,
        rows: Tensor,
        numbers: tuple[Tensor, Tensor],
        names: list[str],
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """One step of programs that choose operation [B,G,O], column [B,G,C] and number [B,G,K]: the number [B,G] that it
        gives, and after it the rows selected [B,G,N] and the last two numbers."""
        outcome, after = torch.zeros_like(numbers[1]), torch.zeros_like(rows)
        computing, selecting = torch.zeros_like(outcome), torch.zeros_like(outcome)  # [B,G] share of such operations
        for name, weight in zip(names, operation.unbind(-1), strict=True):  # [B,G] each
            if name in NUMERIC:
                outcome = outcome + weight * self.number(name, column, rows, numbers)
                computing = computing + weight
            elif name != "print":
                after = after + weight[..., None] * self.select(name, column, number, rows)
                selecting = selecting + weight
        earlier = computing * numbers[1] + (1 - computing) * numbers[0]
        last = outcome + (1 - computing) * numbers[1]
        return outcome, after + (1 - selecting)[..., None] * rows, (earlier, last)

    def printed(self, operation: Tensor, column: Tensor, before: Tensor, names: list[str]) -> Tensor:
        """The weight of each cell [B,G,N,C] in what a step prints of the rows selected before it."""
        if "print" not in names:
            return torch.zeros_like(before[..., None] * column[:, :, None])
        weight = operation[..., names.index("print")]  # [B,G]
        return weight[..., None, None] * before[..., None] * column[:, :, None]

    def number(self, name: str, column: Tensor, before: Tensor, numbers: tuple[Tensor, Tensor]) -> Tensor:
        """What an aggregate gives: [B,G]."""
        if name == "count":
            return before.sum(-1)
        if name == "sum":
            return ((before @ self.values) * column).sum(-1)
        return numbers[0] - numbers[1]

    def select(self, name: str, column: Tensor, number: Tensor, before: Tensor) -> Tensor:
        """The rows [B,G,N] that an operation selects."""
        if name in COMPARISONS:
            held = torch.einsum("bknc,bgk->bgnc", self.holds[name], number)
            held = torch.einsum("bgnc,bgc->bgn", held, column)
            return torch.maximum(before, held) if name.startswith("or_") else before * held
        if name in ("largest", "smallest"):
            better = torch.einsum("bkic,bgk->bgic", self.beaten[name], before)  # [B,G,N,C]
            first = torch.relu(before[..., None] - better) * self.numeric[:, None]
            return torch.einsum("bgnc,bgc->bgn", first, column)
        if name in ("match", "frequent"):
            return before * (column @ (self.matches if name == "match" else self.frequent).mT)
        return self.by_place(name, before)

    def by_place(self, name: str, before: Tensor) -> Tensor:
        """The rows [B,G,N] of the operations that read no column."""
        if name == "first":
            return torch.relu(before - (before.cumsum(-1) - before))
        if name == "last":
            return torch.relu(before - (before.flip(-1).cumsum(-1).flip(-1) - before))
        if name == "previous":
            return F.pad(before[..., 1:], (0, 1))
        if name == "next":
            return F.pad(before[..., :-1], (1, 0)) * self.every[:, None]
        return self.every[:, None].expand_as(before)
