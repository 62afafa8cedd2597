"""Stage `train`: every seed of a recipe, through Ray Train or plainly, with the tracker beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unroll.config import load_recipe
from unroll.copies import kept
from unroll.device import default_device
from unroll.errors import UserError
from unroll.journal import Journal
from unroll.place import Place
from unroll.revision import commit
from unroll.tracking import sent_to_tracker
from unroll.training.context import WorkerContext
from unroll.training.launch import launch, load_profile
from unroll.training.loop import Preempted
from unroll.training.runs import start_folder, train_one


def train(
    root: Path,
    name: str,
    profile: str = "local",
    plain: bool = False,
    tiny: bool = False,
    track: bool = True,
    anyway: bool = False,
) -> None:
    """Train `name`. `plain` needs torch alone: no Ray, no MLflow. `anyway` starts a `gpu` recipe without a GPU.

    Raises:
        UserError: recipe, data or disk.
        Preempted: a stop was asked for and a checkpoint saved.
    """
    recipe, place = load_recipe(root, name, tiny=tiny), Place(root)
    if recipe.suite == "gpu" and profile == "local" and default_device().type == "cpu" and not (tiny or anyway):
        raise UserError(f"recipes.{name}: suite gpu, and no GPU is here; use another --profile, --tiny, or --anyway")
    where = None if plain else load_profile(root, profile)
    for seed in recipe.seeds:
        run = place.run(recipe, seed)
        with kept(run, where.copies if where else ""):
            # Before the sender, as it removes a finished run with all that is in it.
            start_folder(recipe, seed, run, place)
            (run / "stop").unlink(missing_ok=True)
            with Journal(run) as journal:
                journal.tag({"commit": commit(root) or "unknown"})
            with sent_to_tracker(run, root, track and not plain), _ending(run):
                if where is None:
                    train_one(recipe, seed, place, WorkerContext(device=default_device(), stop_file=run / "stop"))
                else:
                    launch(recipe, seed, place, where)


@contextmanager
def _ending(run: Path) -> Iterator[None]:
    """Journal how a run ended when it did not finish."""
    try:
        yield
    except (Preempted, KeyboardInterrupt):
        _end(run, "KILLED")
        raise
    except Exception:
        _end(run, "FAILED")
        raise


def _end(run: Path, status: str) -> None:
    if run.is_dir():
        try:
            with Journal(run) as journal:
                journal.end(status)
        except UserError as error:  # the disk that failed the run may refuse this line too
            print(f"not journalled: {error}", flush=True)
