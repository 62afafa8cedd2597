"""JoeyNMT's own training loop, validation and beam search, driven by `serve.Pace`. Runs in JoeyNMT's environment.

python theirs.py CONFIGURATION.yaml THREADS
"""

from __future__ import annotations

import functools
import sys
import time
from pathlib import Path
from typing import Any

import joeynmt.prediction
import torch
from joeynmt.config import load_config, parse_global_args, set_validation_args
from joeynmt.helpers import load_checkpoint, make_model_dir
from joeynmt.training import TrainManager
from serve import Pace

SEARCH = joeynmt.prediction.search


class Driven(TrainManager):
    """Its trainer; a turn may end before any update."""

    pace: Pace

    def _train_step(self, batch: Any) -> Any:
        self.pace.before_update(batch.ntokens)
        return super()._train_step(batch)


def main() -> None:
    torch.set_num_threads(int(sys.argv[2]))
    content = load_config(Path(sys.argv[1]))
    make_model_dir(Path(content["model_dir"]), overwrite=True)
    args = parse_global_args(content, mode="train")
    model, training, validation, test = joeynmt.prediction.prepare(args, rank=0, mode="train")
    trainer = Driven(
        rank=0,
        model=model,
        model_dir=args.model_dir,
        device=args.device,
        autocast=args.autocast,
        seed=args.seed,
        train_args=args.train,
        dev_args=set_validation_args(args.test),
    )

    def validate() -> dict[str, Any]:
        start = time.perf_counter()
        trainer._validate(validation)
        return {"seconds": time.perf_counter() - start, "best_update": trainer.stats.best_ckpt_iter}

    def use_best() -> dict[str, Any]:
        model.load_state_dict(load_checkpoint(args.model_dir / "best.ckpt", args.device)["model_state"])
        return {}

    def translate(beam: int, batch: int, length: int | None) -> dict[str, Any]:
        options = args.test._replace(beam_size=beam, batch_size=batch)
        if length:  # its configuration has a shortest length, which `predict` does not hand on to the search
            options = options._replace(max_output_length=length)
            joeynmt.prediction.search = functools.partial(SEARCH, min_output_length=length)
        start = time.perf_counter()
        outputs = joeynmt.prediction.predict(model, test, args.device, n_gpu=0, args=options, autocast=args.autocast)
        seconds = time.perf_counter() - start
        end = model.trg_vocab.specials[model.eos_index]
        return {"seconds": seconds, "tokens": [[token for token in line if token != end] for line in outputs[3]]}

    parameters = sum(parameter.numel() for parameter in model.parameters())
    trainer.pace = Pace({"validate": validate, "use_best": use_best, "translate": translate}, parameters)
    trainer.train_and_validate(train_data=training, valid_data=validation)


if __name__ == "__main__":
    main()
