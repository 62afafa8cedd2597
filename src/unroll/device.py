"""Where models run, and that they run there the same way each time."""

from __future__ import annotations

import os

import torch


def default_device() -> torch.device:
    """The GPU if there is one, set so that a run on it can be repeated bit for bit.

    Without these settings cuBLAS shares its workspace among streams and many backward passes add in the order in which
    threads arrive: a resumed training would end with other weights than one that never stopped. An operation that has
    no such form raises an error instead. TensorFloat-32, torch's default for convolutions and recurrences, would make
    `precision: fp32` a lie.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # finds faults, repeats nothing
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return torch.device("cuda")
