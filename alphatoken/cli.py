"""The `alphatoken` command, and how recipes end when a user has to act.

A command first refuses what it can without torch and transformers, which take seconds to load, and
only then imports what it needs.
"""

from __future__ import annotations

import atexit
import gc
import os
import runpy
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import alphatoken
from alphatoken.distributed import process
from alphatoken.errors import ConfigError, NonFiniteError, RemoteError, UserError
from alphatoken.util.files import check_is_new, writing
from alphatoken.util.shipped import SHIPPED

if TYPE_CHECKING:
    from alphatoken.config.run import RunConfig

app = typer.Typer(
    name="alphatoken", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)

values = typer.Typer(no_args_is_help=True)
app.add_typer(values, name="values", help="What recipes/value_tokens.py has stored.")


COLLECTION = gc.get_threshold()
"""How often Python looks for cycles by itself."""

# What starts each recipe: its file in recipes/, and what it does.
RECIPES = {
    "sft": ("sft.py", "Fine-tune on the response tokens that serve the held-out rows."),
    "preference": ("preference.py", "Train on pairs of responses."),
    "fisher": ("fisher.py", "Estimate the Fisher of the model that runs will start from."),
    "value": ("value_tokens.py", "Value every response token of a data set, without training."),
    "evaluate": ("evaluate.py", "Ask a model what it can do, and compare two evaluations."),
}


def next_step(error: UserError | RemoteError, command_line: Sequence[str]) -> str:
    """What to type after a command or recipe has failed, by its own command line."""
    program, *arguments = command_line
    file = Path(program).name
    recipe = next((name for name, (own, _) in RECIPES.items() if own == file), None)
    if isinstance(error, ConfigError):
        return f"alphatoken {recipe or 'sft'} --help lists every key, its default and its reason"
    if isinstance(error, NonFiniteError):
        allow = "'train.resume_allow=[optim.lr]'"
        return f"the same command with train.resume=auto {allow} and a lower optim.lr=..."
    if recipe is not None and recipe != "evaluate":  # doctor is for runs
        given = shlex.join(arguments)
        return f"alphatoken doctor {given} looks for all that would stop the run"
    if recipe is not None:
        return f"alphatoken {recipe} --help lists every key, its default and its reason"
    if file != "alphatoken" and not program.endswith("alphatoken/__main__.py"):
        return f"python {program} --help"
    words = arguments[:2] if arguments[:1] == ["values"] else arguments[:1]
    return " ".join(["alphatoken", *words, "--help"])


@contextmanager
def readable_errors() -> Iterator[None]:
    """Ends a rank when what is inside is done; with status 2 where the user has to act, and a
    message on one rank: 0 if that failed, too."""
    try:
        yield
        process.barrier()
    except (UserError, RemoteError) as error:
        if process.is_to_tell():
            rank = os.environ.get("RANK", "0")
            of_rank = "" if rank == "0" else f"rank {rank}: "
            told = f"error: {of_rank}{error}\nnext: {next_step(error, sys.argv)}"
            print(told, file=sys.stderr, flush=True)
        process.end_process(2)
    else:
        process.end_process(0)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Inside, cycles are not looked for: for what ends in seconds."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"alphatoken {alphatoken.__version__}")
        raise typer.Exit


# DeepSpeed's launcher puts it behind the script's name.
LocalRank = Annotated[
    int | None,
    typer.Option("--local_rank", "--local-rank", hidden=True, help="LOCAL_RANK is what counts."),
]


ConfigFiles = Annotated[
    list[Path],
    typer.Option(
        "--config",
        help="Configuration of a run; section `preference` makes it pairs. Several: keys of "
        "later files count.",
    ),
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value ...")]


def _run_config(files: list[Path], overrides: list[str] | None) -> RunConfig:
    from alphatoken.config.file import load_config
    from alphatoken.config.preference import PreferenceRunConfig
    from alphatoken.config.run import RunConfig

    return load_config(RunConfig, files, overrides or [], {"preference": PreferenceRunConfig})


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
    local_rank: LocalRank = None,
) -> None:
    """Token valuation and masking for LLM post-training."""


@app.command()
def export(
    run: Annotated[
        Path,
        typer.Argument(
            help="Folder of a run (train.output_dir); with --merge also of LoRA adapters."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="New folder to write.")],
    step: Annotated[
        int | None, typer.Option(help="Of which checkpoint; default: the newest undamaged one.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Merge LoRA adapters into the model they belong to.")
    ] = False,
    push: Annotated[
        str | None,
        typer.Option(
            help="Upload it to this repository of the Hugging Face Hub; a new one is private."
        ),
    ] = None,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder: weights, tokenizer and model card."""
    from alphatoken.checkpoints.folder import checkpoints_to_export

    check_is_new(target)
    if not merge:  # or it may be the hub name of adapters
        checkpoints_to_export(run, step)

    from alphatoken.checkpoints.export import export_checkpoint
    from alphatoken.checkpoints.publishing import prepare_repository, push_folder

    repository = None if push is None else prepare_repository(push)
    done = export_checkpoint(run, target, step, merge=merge)
    of_step = "" if done.step is None else f" of step {done.step}"
    typer.echo(f"{done.folder}: {done.parameters} parameters{of_step} in {done.files} file(s)")
    if repository is not None:
        typer.echo(push_folder(target, repository, f"Export of {run.resolve().name}{of_step}"))


@app.command()
def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A run's checkpoints/step-N folder.")],
) -> None:
    """Convert a checkpoint for any number of ranks; resuming on another number does it by
    itself."""
    if not checkpoint.is_dir():
        raise UserError(f"cannot convert {checkpoint}: there is no such folder")

    from alphatoken.checkpoints.files import damage
    from alphatoken.checkpoints.universal import universal_checkpoint

    problem = damage(checkpoint)
    if problem is not None:
        raise UserError(f"cannot convert {checkpoint}: {problem}")
    typer.echo(universal_checkpoint(checkpoint))


@app.command()
def preview(
    config: ConfigFiles,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("-n", "--rows", min=1, help="Rows to show.")] = 3,
    html: Annotated[
        Path | None, typer.Option(help="File to write them to as HTML, besides.")
    ] = None,
) -> None:
    """Show rows of data.train as the model will see them, with what is trained in [[ ]]."""
    run = _run_config(config, overrides)

    from rich.console import Console

    from alphatoken.data.audit import look_at_rows
    from alphatoken.data.preview import previews
    from alphatoken.data.splits import read_splits
    from alphatoken.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    train = read_splits(run, tokenizer).train
    console = Console(record=html is not None, highlight=False, soft_wrap=True)
    for report in train.reports:
        console.print(f"data.train: {report}", markup=False)
    for line in look_at_rows(run, tokenizer):
        console.print(line, markup=False)
    for place, documents in previews(train, tokenizer, rows):
        for document in documents:
            console.rule(place, align="left")
            console.print(document)
    if html is not None:
        with writing(html):
            console.save_html(str(html))


@values.command("export")
def export_stored(
    target: Annotated[Path, typer.Argument(help="New file, or folder of llamafactory.")],
    config: ConfigFiles,
    overrides: Overrides = None,
    form: Annotated[
        str, typer.Option("--format", help="parquet, trl, axolotl or llamafactory.")
    ] = "parquet",
) -> None:
    """Write the rows of data.train with labels on the tokens that selection.store keeps, for
    others to train on."""
    run = _run_config(config, overrides)

    from alphatoken.data.splits import read_splits
    from alphatoken.data.tokenizer import load_tokenizer
    from alphatoken.store.exporting import export_values

    tokenizer = load_tokenizer(run.model)
    done = export_values(run, tokenizer, read_splits(run, tokenizer).train, target, form)
    typer.echo(
        f"{target}: {done.rows} rows, labels on {done.trained} of {done.responses} response tokens"
    )


@app.command()
def tokenise(config: ConfigFiles, overrides: Overrides = None) -> None:
    """Tokenise the rows of a run ahead of it, into the cache that it reads (data.cache_dir).

    Where it was stopped it goes on when it is started again.
    """
    run = _run_config(config, overrides)

    from alphatoken.data.splits import load_prompts, load_splits
    from alphatoken.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(run.model)
    splits = load_splits(run, tokenizer)
    parts = splits.named()
    if run.estimates_fisher:
        parts["fisher.prompts"] = load_prompts(run, tokenizer, splits.train).dataset
    for name, part in parts.items():
        for file, made, report in zip(part.files, part.made, part.reports, strict=True):
            speed = f"{made.rows / made.seconds:.0f} rows/s" if made.rows else "was there"
            typer.echo(f"{name}: {report}\n  {file} ({speed})")


@app.command()
@_without_collection()
def plan(
    config: ConfigFiles,
    world: Annotated[int, typer.Option("--world", min=1, help="Number of ranks.")],
    overrides: Overrides = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="Device to fit into, for example h100-80g.")
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Ranks are processes without an accelerator.")
    ] = False,
    row_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a row; default: the longest allowed.")
    ] = None,
    response_share: Annotated[float, typer.Option(help="Share of response tokens.")] = 1.0,
    from_data: Annotated[
        bool,
        typer.Option(
            "--from-data", help="Take both from data.train, which is read: its longest row."
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
) -> None:
    """Tell memory, messages and work of a run from its configuration and the model's config.json
    alone."""
    run = _run_config(config, overrides)

    import json

    from rich.console import Console

    from alphatoken.planner.plan import make_plan
    from alphatoken.planner.show import as_values, print_plan
    from alphatoken.planner.workload import Rows, longest_rows, rows_of

    if from_data:
        from alphatoken.data.splits import load_splits
        from alphatoken.data.tokenizer import load_tokenizer

        if row_tokens is not None or response_share != 1.0:
            raise UserError(
                "--from-data takes lengths from data.train: leave out --row-tokens and "
                "--response-share"
            )
        rows = rows_of(load_splits(run, load_tokenizer(run.model)).train, len(run.selections))
    else:
        rows = (
            longest_rows(run, response_share)
            if row_tokens is None
            else Rows(row_tokens, response_share)
        )
    made = make_plan(run, rows, world, "cpu" if cpu else gpu)
    if as_json:
        typer.echo(json.dumps(as_values(made), indent=1))
    else:
        print_plan(made, Console())


@app.command()
def doctor(
    config: Annotated[
        list[Path],
        typer.Option(help="The configuration of a run. Several: keys of later files count."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[section.key=value ...]")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document instead.")
    ] = False,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds in which all ranks have to find each other.")
    ] = 60.0,
    local_rank: LocalRank = None,
) -> None:
    """Look for what would stop or spoil a run, on every rank; start it with the run's own launcher.

    Ends with status 1 where a check failed.
    """
    from alphatoken.doctor.examination import examine

    process.end_process(examine(config, overrides or [], as_json=as_json, patience=patience))


@app.command()
def compare(
    before: Annotated[Path, typer.Argument(help="An evaluation that recipes/evaluate.py wrote.")],
    after: Annotated[Path, typer.Argument(help="Another one, of the same items.")],
    resamples: Annotated[int, typer.Option(min=1, help="Bootstrap resamples of the items.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the resamples.")] = 0,
) -> None:
    """Compare two evaluations item by item: every measure, then what was learned and what was
    kept."""
    from rich.console import Console

    from alphatoken.config.evaluation import EvaluationConfig
    from alphatoken.evaluation.comparison import compare as compared
    from alphatoken.evaluation.results import read_evaluation

    settings = EvaluationConfig(resamples=resamples, seed=seed)
    found = compared(read_evaluation(before), read_evaluation(after), settings)
    Console(highlight=False).print(found.table())
    typer.echo(found.sentence())


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of runs (train.output_dir).")
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            help="File to write; default: report.html in the folder of the run, comparison.html "
            "here for several."
        ),
    ] = None,
) -> None:
    """Write what runs have measured, and what their tokens were worth, as one HTML page: one run,
    or several side by side."""
    import alphatoken.training.metrics  # noqa: F401  declares what a page tells the meaning of
    from alphatoken.checkpoints.folder import RunFolder
    from alphatoken.report.page import write_report

    if output is None:
        output = RunFolder(runs[0]).report if len(runs) == 1 else Path("comparison.html")
    with writing(output):
        write_report(runs, output)
    typer.echo(output)


@app.command()
def new(
    name: Annotated[
        str,
        typer.Argument(
            help="What the run is called, or a file: NAME.yaml is written, for a run in the folder "
            "NAME beside that of the configuration copied."
        ),
    ],
    like: Annotated[
        Path, typer.Option(help="Configuration to copy, as configs/sft/quickstart.yaml.")
    ],
) -> None:
    """Copy a configuration, comments included, as that of a new run."""
    from alphatoken.config.copying import copy_config

    target = Path(name if name.endswith((".yaml", ".yml")) else f"{name}.yaml")
    folder = copy_config(target, like)
    typer.echo(f"{target}: like {like}, for a run in {folder}. Next, edit it, then:")
    for command in _first_commands(target):
        typer.echo(f"  {command}")


def _first_commands(config: Path) -> Iterator[str]:
    """What to type with a new configuration."""
    from alphatoken.config.file import read_text, sections_of

    recipe = "preference" if "preference" in sections_of(read_text(config), config) else "sft"
    given = f"--config {shlex.quote(str(config))}"
    yield f"alphatoken preview {given}"
    yield f"alphatoken plan {given} --world 8 --gpu h100-80g"
    yield f"alphatoken {recipe} {given}"


@app.command()
def schema(
    output: Annotated[Path | None, typer.Option(help="File to write it to instead.")] = None,
) -> None:
    """Print the JSON schema of configurations, with which editors complete keys and underline
    mistakes."""
    import json

    from alphatoken.config.schema import config_schema

    text = json.dumps(config_schema(), indent=1)
    if output is None:
        typer.echo(text)
        return
    with writing(output):
        output.write_text(text + "\n", encoding="utf-8")
    typer.echo(f"{output}; as the first line of a configuration, many editors take it from")
    typer.echo(f"# yaml-language-server: $schema={output.resolve()}")


def _start_recipe(file: str, arguments: list[str]) -> None:
    """Runs a recipe here, where this is a rank already or only its keys are asked for; else takes
    this process's place with the launcher of this machine."""
    recipe = SHIPPED / "recipes" / file
    is_run = any(each.startswith("--config") for each in arguments)
    if "RANK" in os.environ or not is_run or {"-h", "--help"} & {*arguments}:
        gc.set_threshold(*COLLECTION)
        sys.argv = [str(recipe), *arguments]
        runpy.run_path(str(recipe), run_name="__main__")
        return
    # The launcher's python and deepspeed are those of this environment, activated or not.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    launcher = str(SHIPPED / "launch" / "local.sh")
    os.execvpe("bash", ["bash", launcher, str(recipe), *arguments], {**os.environ, "PATH": path})


def _add_recipe(name: str, file: str, description: str) -> None:
    @app.command(
        name,
        help=f"{description} On the accelerators of this machine, or RANKS processes; as a rank "
        "where a launcher has started it.",
        short_help=description,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,  # the recipe explains its keys
        rich_help_panel="Recipes",
    )
    def start(context: typer.Context) -> None:
        _start_recipe(file, context.args)


for _name, (_file, _description) in RECIPES.items():
    _add_recipe(_name, _file, _description)


def main() -> None:
    # Commands load thousands of modules, none of which is garbage: looking for cycles among them as
    # often as Python does takes a fifth of the time that they need to start, and once more as it
    # ends a second.
    gc.set_threshold(50_000)
    atexit.register(gc.freeze)
    with readable_errors():
        app()
