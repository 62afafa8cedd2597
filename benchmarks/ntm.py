"""Speed of the neural Turing machine: copy of 10 vectors of 8 bits, LSTM-100, memory 128 x 20, training steps on one thread.

    python benchmarks/ntm.py              against a plain machine, then the cost of a step for 128 to 8,192 slots
    python benchmarks/ntm.py --seconds 5  longer measurements
    python benchmarks/ntm.py --threads 2  on two threads, as pytorch-ntm was seen, on a machine that does nothing else

The plain machine is written the way that loudinthecloud/pytorch-ntm is: one Python step a time step, a module a head, a
convolution a row; the same equations and sizes. Both take turns in this process; time is processor time, so that a busy
machine moves it little; of more than one thread it is the time on the clock. pytorch-ntm itself was seen to train 18.5
sequences/s at batch 1 and 100 at batch 32 on two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unroll.layers.ntm import Config, Layer
from unroll.memory import keep_freed_memory

SEEN = {1: 18.5, 32: 100.0}
GOAL = {1: 5, 32: 10}
LENGTH, BITS, WIDTH, SLOTS, SLOT_WIDTH = 10, 8, 100, 128, 20


class PlainHead(nn.Module):
    """One head: its parameters from the controller, its address, and what it reads or writes."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.sizes = [SLOT_WIDTH, 1, 1, 3, 1] + ([SLOT_WIDTH, SLOT_WIDTH] if writes else [])
        self.writes = writes
        self.linear = nn.Linear(WIDTH, sum(self.sizes))

    def forward(self, controller: Tensor, before: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        parts = self.linear(controller).split(self.sizes, dim=1)
        k, beta, g, s, gamma = parts[:5]
        w = self.address(memory, before, k, F.softplus(beta), g.sigmoid(), s.softmax(1), 1 + F.softplus(gamma))
        if not self.writes:
            return torch.matmul(w.unsqueeze(1), memory).squeeze(1), w
        erase, add = parts[5].sigmoid(), parts[6]
        erased = torch.matmul(w.unsqueeze(-1), erase.unsqueeze(1))
        added = torch.matmul(w.unsqueeze(-1), add.unsqueeze(1))
        return memory * (1 - erased) + added, w

    def address(
        self, memory: Tensor, before: Tensor, k: Tensor, beta: Tensor, g: Tensor, s: Tensor, gamma: Tensor
    ) -> Tensor:
        cosine = F.cosine_similarity(memory + 1e-16, k.unsqueeze(1) + 1e-16, dim=-1)
        wg = g * F.softmax(beta * cosine, dim=1) + (1 - g) * before
        shifted = torch.zeros_like(wg)
        for row in range(len(wg)):
            around = torch.cat([wg[row, -1:], wg[row], wg[row, :1]])
            shifted[row] = F.conv1d(around.view(1, 1, -1), s[row].view(1, 1, -1)).view(-1)
        w = shifted**gamma
        return w / (w.sum(dim=1, keepdim=True) + 1e-16)


class Plain(nn.Module):
    """The machine, one step a call."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(BITS + 1 + SLOT_WIDTH, WIDTH)
        self.heads = nn.ModuleList([PlainHead(False), PlainHead(True)])
        self.output = nn.Linear(WIDTH + SLOT_WIDTH, BITS)

    def forward(self, inputs: Tensor) -> Tensor:
        """[B,T,D] -> logits [B,T,O]."""
        rows = len(inputs)
        state = (torch.zeros(1, rows, WIDTH), torch.zeros(1, rows, WIDTH))
        memory, read = torch.full((rows, SLOTS, SLOT_WIDTH), 1e-6), torch.zeros(rows, SLOT_WIDTH)
        weights = [torch.zeros(rows, SLOTS) for _ in self.heads]
        outputs = []
        for x in inputs.unbind(1):
            hidden, state = self.lstm(torch.cat([x, read], dim=1).unsqueeze(0), state)
            hidden = hidden.squeeze(0)
            read, weights[0] = self.heads[0](hidden, weights[0], memory)
            memory, weights[1] = self.heads[1](hidden, weights[1], memory)
            outputs.append(self.output(torch.cat([hidden, read], dim=1)))
        return torch.stack(outputs, 1)


class Ours(nn.Module):
    """The sequence layer and a linear map."""

    def __init__(self, slots: int = SLOTS) -> None:
        super().__init__()
        self.layer = Layer(BITS + 1, WIDTH, Config(slots=slots, slot_width=SLOT_WIDTH))
        self.output = nn.Linear(WIDTH, BITS)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.layer(inputs, self.layer.initial_state(len(inputs)))
        values: Tensor = self.output(hidden)
        return values


def trainer(model: nn.Module, rows: int) -> Callable[[], None]:
    """A training step on a new batch."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=1e-4, alpha=0.95, momentum=0.9)

    def step() -> None:
        vectors = torch.randint(0, 2, (rows, LENGTH, BITS)).float()
        inputs = torch.zeros(rows, 2 * LENGTH + 1, BITS + 1)
        inputs[:, :LENGTH, :BITS], inputs[:, LENGTH, BITS] = vectors, 1
        loss = F.binary_cross_entropy_with_logits(model(inputs)[:, LENGTH + 1 :], vectors)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()

    return step


def best_times(steps: list[Callable[[], None]], seconds: float, rounds: int = 5) -> list[float]:
    """Least time of a step of each, over rounds in which they take turns."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    best = [float("inf")] * len(steps)
    for step in steps:
        step()
    for _ in range(rounds):
        for number, step in enumerate(steps):
            count, started = 0, clock()
            while clock() - started < seconds / rounds:
                step()
                count += 1
            best[number] = min(best[number], (clock() - started) / count)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=2.0, help="time of each measurement")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    seconds = options.seconds
    torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    keep_freed_memory()  # as every training does
    print("| batch | plain, sequences/s | this project | ratio | over the seen pytorch-ntm | goal |")
    print("|---|---|---|---|---|---|")
    for rows, seen in SEEN.items():
        plain, ours = best_times([trainer(Plain(), rows), trainer(Ours(), rows)], seconds)
        print(f"| {rows} | {rows / plain:.1f} | {rows / ours:.1f} | {plain / ours:.1f} | {rows / ours / seen:.1f} ({seen}) | "
              f"{GOAL[rows]} |", flush=True)  # fmt: skip
    print("\n| slots | ms a time step, batch 1 | batch 8 | batch 8, of that of half the slots |")
    print("|---|---|---|---|")
    before = None
    for slots in (128, 256, 512, 1024, 2048, 4096, 8192):
        times = [best_times([trainer(Ours(slots), rows)], seconds / 2)[0] / (2 * LENGTH + 1) for rows in (1, 8)]
        ratio = "" if before is None else f"{times[1] / before:.2f}"
        print(f"| {slots} | {1000 * times[0]:.2f} | {1000 * times[1]:.2f} | {ratio} |", flush=True)
        before = times[1]


if __name__ == "__main__":
    main()
