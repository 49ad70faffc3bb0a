"""`gemcutter eval`: how good a model's answers are, task by task.

Owns the options, the order of the runs and the exit code, 1 where an item failed. Read `gemcutter/evals/task.py` for what a task
is, `gemcutter/evals/run.py` for how one is run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.loading import load_model
from gemcutter.cli.measured import describe_model
from gemcutter.cli.terminal import note, print_json, progress

if TYPE_CHECKING:
    from gemcutter.api import Model
    from gemcutter.evals.records import RunFile
    from gemcutter.evals.run import How
    from gemcutter.evals.task import Asked, Item, Mode, Task

HELP = """
Ask a model the questions of a task, and say how many answers are right.

The same task is asked in several ways in the world, whose numbers lie up to 20 points apart: --mode says which, and no table
mixes them. Without --task, all tasks and modes are listed. Data comes from the folder of --data (parquet, JSON lines, JSON or CSV
as the data set is published), else from the hub; tasks whose items are generated need none, and `--task smoke` is all of those
in short.

Every item is written to a file under --output as soon as it is answered. The same command again goes on where a kill has stopped
it, and prints the table of a run that is complete. Printed are the share of right answers with its interval of 95 percent, and
how many replies were cut off, could not be read, or failed; where one failed, the exit code is 1.

With --compare two models, or two runs' files, are compared item by item.
"""
EXAMPLES = """\b
Examples:
  gemcutter eval
  gemcutter eval demo --task smoke
  gemcutter eval MODEL --task mmlu --mode raw5 --data mmlu/ --limit 500
  gemcutter eval --compare MODEL OTHER --task mmlu --mode ll
"""
OUTPUT = Path("eval-results")
BATCH = 8  # sequences in a step

Models = Annotated[
    list[str] | None,
    typer.Argument(metavar="MODEL [OTHER]", help="What is asked; with --compare two, or two files of runs.", show_default=False),
]


@dataclass(frozen=True, slots=True)
class Asking:
    """What is asked, and of which items."""

    task: Annotated[str | None, typer.Option(metavar="TASK[,TASK]", help="What to ask; none lists all.")] = None
    mode: Annotated[str | None, typer.Option(metavar="MODE", help="In which way.  [default: a task's only one]")] = None
    data: Annotated[str | None, typer.Option(metavar="PATH", help="Folder or file of the data.  [default: the hub's]")] = None
    limit: Annotated[int | None, typer.Option(metavar="N", min=1, help="Ask N items, drawn with the seed.")] = None
    subjects: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Ask these subjects alone; repeatable.")] = None
    seed: Annotated[int, typer.Option(metavar="N", help="For drawing items, and for sampling.")] = 0
    shots: Annotated[int | None, typer.Option(metavar="N", min=0, help="Examples before a question.  [default: mode's]")] = None
    extract: Annotated[str | None, typer.Option(metavar="RULE", help="How answers are read.  [default: the mode's]")] = None
    option: Annotated[
        list[str] | None, typer.Option("--option", metavar="NAME=VALUE", help="Something of one task's own; repeatable.")
    ] = None
    think: Annotated[bool, typer.Option("--think", help="Let the model think before it answers.")] = False
    max_tokens: Annotated[int | None, typer.Option(metavar="N", min=1, help="Most tokens of a reply.  [default: mode's]")] = None


Output = Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs are written.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print prompts as the model would read them, and ask nothing.")]
Compare = Annotated[bool, typer.Option("--compare", help="Compare two models, or two runs' files, item by item.")]
Batch = Annotated[int, typer.Option("--max-num-seqs", metavar="N", min=1, help="Sequences that run at a time.")]


@options.spread
def eval(
    models: Models = None,
    *,
    asking: Asking,
    output: Output = OUTPUT,
    dry_run: DryRun = False,
    compare: Compare = False,
    max_num_seqs: Batch = BATCH,
    as_json: options.Json = False,
    loading: options.Loading,
    context: options.Context = None,
    kv: options.Kv = None,
) -> None:
    """Run what is asked and print the results. Raises UsageError or GemcutterError."""
    if asking.task is None and not compare:
        list_tasks()
        return
    if len(models or ()) != (2 if compare else 1):
        raise UsageError("--compare takes two models, or two files of runs" if compare else "give one MODEL")
    assert models is not None
    how = {"context": context, "kv": kv, "max_num_seqs": max_num_seqs}
    if compare:
        raise UsageError("--compare")
    runs = run_tasks(models[0], asking, loading, how, output, dry_run, as_json)
    if as_json:
        print_json([as_object(run) for run in runs])
    if failed := sum(record.error is not None for run in runs for record in run.records.values()):
        note(f"{failed} items failed; the same command asks them again")
        raise typer.Exit(1)


def list_tasks() -> None:
    """Print all tasks with their modes."""
    from gemcutter.evals.tasks import TASKS, open_task

    for name in TASKS:
        task = open_task(name)
        print(f"{name}: {task.about}")
        for mode in task.modes:
            print(f"  {mode.name:<16} {mode.about}")


def read_asked(asking: Asking) -> tuple[Asked, How]:
    """Return what every task of a command line is asked. Raises UsageError."""
    from gemcutter.evals.run import How
    from gemcutter.evals.task import Asked

    pairs = [text.partition("=") for text in asking.option or ()]
    if bad := next((name for name, equals, _ in pairs if not name or not equals), None):
        raise UsageError(f"--option: expected NAME=VALUE, found {bad!r}")
    asked = Asked(
        limit=asking.limit,
        subjects=tuple(asking.subjects or ()),
        seed=asking.seed,
        shots=asking.shots,
        extract=asking.extract,
        options={name: value for name, _, value in pairs},
    )
    return asked, How(think=asking.think, max_tokens=asking.max_tokens, seed=asking.seed)


def read_tasks(asking: Asking, asked: Asked) -> list[tuple[Task, Mode, list[Item]]]:
    """Return the tasks of a command line with their items, before any model is loaded. Raises GemcutterError."""
    from gemcutter.evals.data import Data
    from gemcutter.evals.run import items_of
    from gemcutter.evals.tasks import TASKS, expand, find_mode, open_task

    found = list[tuple[Any, Any, Any]]()
    for name in expand(asking.task or ""):
        task = open_task(name)
        mode = find_mode(task, asking.mode)
        found.append((task, mode, items_of(task, Data.of(name, TASKS[name].repo, asking.data), mode, asked)))
    return found


def run_tasks(
    name: str, asking: Asking, loading: options.Loading, how_loaded: dict[str, Any], output: Path, dry_run: bool, as_json: bool
) -> list[RunFile]:
    """Run the tasks of a command line on one model and show each as it ends. Raises GemcutterError."""
    from gemcutter.evals import session

    asked, how = read_asked(asking)
    tasks = read_tasks(asking, asked)
    for task, mode, _ in tasks:
        session.check(task, mode, None, how)
    media = sorted({kind for task, _, _ in tasks for kind in task.media})
    found: list[RunFile] = []
    with load_model(name, loading, prefix_cache_bytes=None, **how_loaded, media=tuple(media)) as model:
        described = describe_model(model, name, loading) | {"kv": how_loaded["kv"]}
        for task, mode, items in tasks:
            session.check(task, mode, model, how)
            if dry_run:
                for text in session.rendered(model, mode, items, how):
                    print(text)
            else:
                found.append(run_task(model, described, task, mode, items, asked, how, output, as_json))
    return found


def run_task(
    model: Model,
    described: dict[str, Any],
    task: Task,
    mode: Mode,
    items: list[Item],
    asked: Asked,
    how: How,
    output: Path,
    as_json: bool,
) -> RunFile:
    """Run one task, or what a kill has left of it, and show it. Raises GemcutterError."""
    from gemcutter.evals import records, report, session
    from gemcutter.evals.run import run

    header = session.header(model, described, task, mode, items, asked, how)
    file = session.file_of(output, header)
    with records.Log(file, header) as log, progress(f"{task.name}/{mode.name}") as advance:
        if log.done:
            note(f"{file} has {len(log.done)} of {len(items)} items; asking the others")
        seconds = run(model, task, mode, items, asked, how, log, advance)
    found = records.read(file)
    if not as_json:
        for line in report.spell(found.header, report.summarize(list(found.records.values())), seconds):
            print(line)
        print(f"written to  {file}")
    return found


def as_object(run: RunFile) -> dict[str, Any]:
    """Return a run as JSON has it."""
    from gemcutter.evals.report import summarize

    return {**run.header, "result": summarize(list(run.records.values())).as_json()}
