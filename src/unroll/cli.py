"""The `unroll` command. Every subcommand is a few lines; the work is in `stages/` and beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from unroll.errors import UserError

EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
"""Exit code of a run that was asked to stop and saved a checkpoint (EX_TEMPFAIL: run it again to go on)."""

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  help="One pipeline trains and evaluates every sequence model, from n-grams on.")  # fmt: skip

LOOK, USE = "Look", "Use a trained model"
PIPELINE, STAGES = "Run the pipeline", "Run one stage of it"

Name = Annotated[str, typer.Argument(help="a recipe of recipes/*.yaml; `unroll ls` lists them")]
Track = Annotated[bool, typer.Option(envvar="UNROLL_TRACK", help="send the run's journal to MLflow")]
Tiny = Annotated[bool, typer.Option("--tiny", help="run the recipe's tiny twin, which ends in seconds")]


def project_root() -> Path:
    """The nearest folder upwards that holds a params.yaml (relative, so that no path of the machine is recorded).

    Raises:
        UserError: there is none.
    """
    here = Path.cwd()
    for number, folder in enumerate([here, *here.parents]):
        if (folder / "params.yaml").exists():
            return Path(os.path.join(*[".."] * number)) if number else Path()
    raise UserError(f"{here}: no params.yaml here or above; run unroll inside a project (a clone of the repository)")


@app.command(rich_help_panel=LOOK)
def ls(suite: Annotated[str | None, typer.Option(help="only this suite")] = None) -> None:
    """List recipes with their state and scores."""
    from unroll.listing import print_recipes

    print_recipes(project_root(), suite)


@app.command(rich_help_panel=LOOK)
def show(recipe: Name, tiny: Tiny = False) -> None:
    """Say what a recipe would do: shapes, parameters, memory and time, without running it."""
    from unroll.listing import print_recipe

    print_recipe(project_root(), recipe, tiny)


@app.command(rich_help_panel=STAGES)
def prepare(
    dataset: Annotated[str, typer.Argument(help="a data set of params.yaml")],
    trust_first_download: Annotated[
        bool, typer.Option("--trust-first-download", help="download what has no known hash, and record it")
    ] = False,
) -> None:
    """Download, verify and turn a data set into shards."""
    from unroll.data.shards import load_manifest
    from unroll.stages.prepare import prepare as stage

    folder = stage(project_root(), dataset, trust_first_download)
    typer.echo(folder)
    skipped = [f"{reason} {count}" for reason, count in load_manifest(folder)["skipped"].items() if count]
    if skipped:
        typer.echo(f"skipped: {', '.join(skipped)}", err=True)


@app.command(hidden=True)
def dependencies() -> None:
    """Write which source files every model, task and preparer reads: what DVC compares."""
    from unroll.config import load_recipes
    from unroll.dependencies import write

    root = project_root()
    write(root / "data" / "dependencies", load_recipes(root).values())


@app.command(rich_help_panel=STAGES)
def train(
    recipe: Name,
    tiny: Tiny = False,
    profile: Annotated[
        str, typer.Option(envvar="UNROLL_PROFILE", help="where to run: cluster/profiles.yaml")
    ] = "local",
    plain: Annotated[bool, typer.Option("--plain", help="torch alone: no Ray, no MLflow")] = False,
    track: Track = True,
    anyway: Annotated[bool, typer.Option("--anyway", help="start a recipe of suite gpu without a GPU")] = False,
) -> None:
    """Train a recipe; an interrupted run goes on where it stopped."""
    from unroll.stages.train import train as stage

    stage(project_root(), recipe, profile, plain, tiny, track, anyway)


@app.command(rich_help_panel=STAGES)
def predict(recipe: Name, tiny: Tiny = False) -> None:
    """Write what the trained model says of the test split."""
    from unroll.stages.predict import predict as stage

    stage(project_root(), recipe, tiny)


@app.command(rich_help_panel=STAGES)
def evaluate(recipe: Name, tiny: Tiny = False, track: Track = True) -> None:
    """Score the predictions, with intervals."""
    from unroll.stages.evaluate import evaluate as stage

    typer.echo(stage(project_root(), recipe, tiny, track))


@app.command(rich_help_panel=STAGES)
def report(suite: Annotated[str, typer.Argument(help="demo, cpu or gpu")]) -> None:
    """Write the leaderboard page of a suite."""
    from unroll.stages.report import report as stage

    typer.echo(stage(project_root(), suite))


@app.command(rich_help_panel=STAGES)
def results(check: Annotated[bool, typer.Option("--check", help="fail if the pages are out of date")] = False) -> None:
    """Write docs/results.md and the README's table from results/*."""
    from unroll.report.results_page import write

    write(project_root(), check)


@app.command(rich_help_panel=USE)
def generate(
    recipe: Name,
    prompt: Annotated[str, typer.Option(help="text to go on from")] = "\n",
    length: Annotated[int, typer.Option(min=1, help="tokens to generate")] = 400,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time")] = 0.8,
    top_k: Annotated[int | None, typer.Option(min=1)] = None,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0)] = None,
    seed: int = 1,
) -> None:
    """Write text with a trained language model."""
    from unroll.config import load_recipe
    from unroll.data.tokenizers import load as load_tokenizer
    from unroll.device import default_device
    from unroll.place import Place
    from unroll.tasks.language_modeling import Samples
    from unroll.tasks.language_modeling import generate as texts
    from unroll.training.runs import load_model

    root = project_root()
    entry = load_recipe(root, recipe)
    folder = Place(root).model(entry, entry.seeds[0])
    _, model = load_model(folder)
    options = Samples(prompt=prompt, length=length, temperatures=(temperature,), top_k=top_k, top_p=top_p)
    device = default_device()
    for sample in texts(model.to(device), load_tokenizer(folder / "tokenizer.json"), options, seed, device):
        typer.echo(sample["prompt"] + sample["text"])


@app.command(rich_help_panel=USE)
def translate(
    recipe: Name,
    text: Annotated[list[str] | None, typer.Argument(help="sentences; without any, standard input is read")] = None,
    file: Annotated[Path | None, typer.Option(help="translate the lines of this file")] = None,
    beam: Annotated[int, typer.Option(min=1, help="width of the beam; 1 is greedy")] = 5,
    n_best: Annotated[int, typer.Option(min=1, help="hypotheses a sentence, with their scores")] = 1,
    length_penalty: Annotated[float, typer.Option(min=0.0, help="0 favours short sentences")] = 1.0,
    attention: Annotated[
        Path | None, typer.Option(help="draw the attention of the best hypothesis into this SVG")
    ] = None,
) -> None:
    """Translate sentences, a file or standard input, line by line, with a trained recipe."""
    from unroll.stages.translate import translate as stage

    stage(project_root(), recipe, text, file, beam, n_best, length_penalty, attention)


@app.command(rich_help_panel=USE)
def ask(
    recipe: Name,
    story: Annotated[Path, typer.Argument(help="a text file: one fact a sentence")],
    questions: Annotated[list[str], typer.Argument(help='such as "Where is the ring?"')],
    picture: Annotated[Path | None, typer.Option(help="draw the attention of each hop over the facts: a PNG")] = None,
    facts: Annotated[int, typer.Option(min=1, help="facts to show for each hop")] = 3,
) -> None:
    """Answer questions about a story with a trained recipe, and show the facts that it attended to."""
    from unroll.stages.ask import ask as stage

    stage(project_root(), recipe, story, questions, picture, facts)


@app.command(rich_help_panel=USE)
def caption(
    recipe: Name,
    files: Annotated[list[Path], typer.Argument(help="images and clips")],
    beam: Annotated[int, typer.Option(min=1, help="width of the beam; 1 is greedy")] = 3,
    n_best: Annotated[int, typer.Option(min=1, help="captions a file, with their scores")] = 1,
    attention: Annotated[
        Path | None, typer.Option(help="draw where the model looked in the first file into this PNG")
    ] = None,
) -> None:
    """Say what images and clips show, with a trained recipe."""
    from unroll.stages.caption import caption as stage

    stage(project_root(), recipe, files, beam, n_best, attention)


@app.command(rich_help_panel=PIPELINE)
def repro(
    targets: Annotated[list[str] | None, typer.Argument(help="stages of dvc.yaml; none: all of them")] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="stages at a time, 1 unless given")] = None,
    ray: Annotated[bool, typer.Option("--ray", help="as Ray tasks; as many as there is room for")] = False,
    profile: Annotated[
        str, typer.Option(envvar="UNROLL_PROFILE", help="with --ray: where to run, cluster/profiles.yaml")
    ] = "local",
    track: Track = True,
) -> None:
    """Reproduce the stages of dvc.yaml as `dvc repro` does, several at a time."""
    from unroll.repro.schedule import repro as reproduce

    os.chdir(project_root())
    os.environ["UNROLL_TRACK"] = str(int(track))  # for the stages
    raise typer.Exit(reproduce(targets or [], jobs, profile if ray else None, track))


@app.command(rich_help_panel=PIPELINE)
def submit(
    targets: Annotated[list[str] | None, typer.Argument(help="stages of dvc.yaml; none: all of them")] = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="the dashboard of the cluster")
    ] = "http://127.0.0.1:8265",
    folder: Annotated[
        str | None,
        typer.Option(envvar="UNROLL_FOLDER", help="the project's place on the cluster, which all its machines share"),
    ] = None,
    profile: Annotated[str, typer.Option(envvar="UNROLL_PROFILE", help="cluster/profiles.yaml")] = "cluster",
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="stages at a time")] = None,
    serial: Annotated[bool, typer.Option("--serial", help="`dvc repro` instead of `unroll repro --ray`")] = False,
    install: Annotated[bool, typer.Option("--install", help="install the packages of constraints.txt first")] = False,
    push: Annotated[bool, typer.Option("--push", help="`dvc push` what was computed")] = False,
    include: Annotated[list[str] | None, typer.Option(help="a file or folder to send besides the project")] = None,
    follow: Annotated[str | None, typer.Option(help="no new job: follow this one again")] = None,
) -> None:
    """Send the pipeline to a Ray cluster, follow its log, fetch results and report."""
    from unroll.submit import Job, connect, watch
    from unroll.submit import submit as send

    root = project_root()
    if follow is not None:
        raise typer.Exit(watch(root, connect(address), follow))
    at_a_time = [] if jobs is None else ["--jobs", str(jobs)]
    command = ["dvc", "repro"] if serial else ["unroll", "repro", "--ray", "--profile", profile, *at_a_time]
    place = folder or f"~/unroll-jobs/{root.resolve().name}"
    raise typer.Exit(
        send(root, address, Job([*command, *(targets or [])], place, profile, include or [], install, push))
    )


@app.command(rich_help_panel=LOOK)
def doctor(
    cluster: Annotated[
        bool, typer.Option("--cluster", help="the cluster of a profile instead of this machine")
    ] = False,
    profile: Annotated[
        str, typer.Option(envvar="UNROLL_PROFILE", help="with --cluster: cluster/profiles.yaml")
    ] = "cluster",
) -> None:
    """Check versions, threads, Java, GPU, Ray, MLflow, disk and data; or every node of a cluster."""
    from unroll.doctor import checks, print_checks

    root = project_root()
    if cluster:
        from unroll.doctor_cluster import cluster_checks

        found = cluster_checks(root, profile)
    else:
        found = checks(root)
    if not print_checks(found):
        raise typer.Exit(1)


@app.command("track", rich_help_panel=PIPELINE)
def send_journals() -> None:
    """Send to MLflow what an absent server has not yet got."""
    from unroll.sender import send_pending

    sent = send_pending(project_root())
    for problem in sent.problems:
        typer.secho(problem, fg=typer.colors.RED, err=True)
    typer.echo(f"{sent.runs} runs sent")
    raise typer.Exit(EXIT_USER_ERROR if sent.problems else 0)


def main() -> None:
    """Run the command; the user's mistakes become one line and exit code 2."""
    try:
        app()
    except UserError as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        sys.exit(EXIT_USER_ERROR)
    except Exception as error:
        if type(error).__name__ != "Preempted":
            raise
        typer.secho(f"{error}; run the same command again to go on", err=True)
        sys.exit(EXIT_PREEMPTED)
