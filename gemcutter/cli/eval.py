"""`gemcutter eval`: how good a model's answers are, task by task.

Owns the options, the order of the runs and the exit code, 1 where an item failed. Read `gemcutter/evals/task.py` for what a task
is, `gemcutter/evals/run.py` for how one is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.cli import options
from gemcutter.cli.failure import UsageError
from gemcutter.cli.loading import load_model
from gemcutter.cli.measured import describe_model
from gemcutter.cli.parse import open_tokenizer
from gemcutter.cli.terminal import note, print_json, progress
from gemcutter.errors import RequestError
from gemcutter.load_options import AUTO_MEDIA

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

With --compare two models, or two runs' files, are compared item by item: both shares and their difference, which items flipped,
and McNemar's exact test. --with gives the second model load options of its own, so that both may be the same model. The
certificate of `gemcutter verify` follows where models were asked. The exit code says that the runs are complete, not that they agree.
"""
EXAMPLES = """\b
Examples:
  gemcutter eval
  gemcutter eval demo --task smoke
  gemcutter eval MODEL --task mmlu --mode raw5 --data mmlu/ --limit 500
  gemcutter eval --compare MODEL OTHER --task mmlu --mode ll
  gemcutter eval --compare demo demo --with quant=q4 --task arithmetic/chat --option count=20
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

    task: Annotated[str | None, typer.Option(metavar="TASK[/MODE][,TASK...]", help="What to ask; none lists all.")] = None
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


@dataclass(frozen=True, slots=True)
class Side:
    """A model and how it is loaded; `told` is what a run's header says of that beside what `measured.py` does."""

    model: str
    loading: options.Loading
    engine: dict[str, Any]
    told: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Planned:
    """A task that will be asked, with its items. Of a suite, what the model can't be asked is left out."""

    task: Task
    mode: Mode
    items: list[Item]
    asked: Asked
    is_of_suite: bool


Output = Annotated[Path, typer.Option(metavar="FOLDER", help="Where runs are written.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print prompts as the model would read them, and ask nothing.")]
Compare = Annotated[bool, typer.Option("--compare", help="Compare two models, or two runs' files, item by item.")]
Changes = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="KEY=VALUE",
        help="A load option of the second model alone, such as kernels=reference, quant=q4 or speculate=ngram; repeatable.",
        show_default=False,
    ),
]
Batch = Annotated[int, typer.Option("--max-num-seqs", metavar="N", min=1, help="Sequences that run at a time.")]


@options.spread
def eval(
    models: Models = None,
    *,
    asking: Asking,
    output: Output = OUTPUT,
    dry_run: DryRun = False,
    compare: Compare = False,
    changes: Changes = None,
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
    if changes and not compare:
        raise UsageError("--with changes the second model of --compare; other options change the one that is asked")
    if compare and dry_run:
        raise UsageError("--dry-run shows the prompts of one model; leave out --compare")
    assert models is not None
    side = Side(models[0], loading, {"context": context, "kv": kv, "max_num_seqs": max_num_seqs})
    if compare:
        from gemcutter.cli.eval_compare import compare_runs

        insist_complete(compare_runs(models, side, changes or (), asking, output, as_json))
        return
    runs = run_tasks(side, asking, output, dry_run, as_json)
    if as_json and not dry_run:
        print_json([as_object(run) for run in runs])
    insist_complete(runs)


def insist_complete(runs: Sequence[RunFile]) -> None:
    """Raise typer.Exit with 1 where an item failed."""
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


def read_tasks(model: str, asking: Asking, asked: Asked, how: How) -> list[Planned]:
    """Return the tasks of a command line with their items, before any model is loaded. Raises GemcutterError.

    Parts of a suite that can't be asked on this machine are told and left out.
    """
    from gemcutter.evals import session
    from gemcutter.evals.data import Data
    from gemcutter.evals.run import items_of
    from gemcutter.evals.tasks import TASKS, expand, find_mode, open_task

    found = list[Planned]()
    asked = replace(asked, open_tokenizer=cache(partial(open_tokenizer, model)))
    for part in expand(asking.task or ""):
        task = open_task(part.task)
        mode = find_mode(task, part.mode or asking.mode)
        session.check(task, mode, None, how)
        own = replace(asked, options={**part.options, **asked.options})
        try:
            items = items_of(task, Data.of(task.name, TASKS[task.name].repo, asking.data), mode, own)
        except RequestError as error:
            if not (part.is_of_suite and task.media):
                raise
            note(f"left out: {error}")
        else:
            found.append(Planned(task, mode, items, own, part.is_of_suite))
    return found


def media_of(tasks: Sequence[Planned]) -> tuple[str, ...]:
    """Return what a model is loaded for: the media of tasks, and of a suite those for which the checkpoint has a tower."""
    media = {kind for each in tasks for kind in each.task.media if not each.is_of_suite}
    is_open = any(each.task.media for each in tasks if each.is_of_suite)
    return (*((AUTO_MEDIA,) if is_open else ()), *sorted(media))


def run_tasks(side: Side, asking: Asking, output: Path, dry_run: bool, as_json: bool) -> list[RunFile]:
    """Run the tasks of a command line on one model and show each as it ends. Raises GemcutterError."""
    from gemcutter.evals import session

    asked, how = read_asked(asking)
    tasks = read_tasks(side.model, asking, asked, how)
    found: list[RunFile] = []
    with load_model(side.model, side.loading, prefix_cache_bytes=None, **side.engine, media=media_of(tasks)) as model:
        described = describe_model(model, side.model, side.loading) | {"kv": side.engine["kv"], **side.told}
        for planned in tasks:
            try:
                session.check(planned.task, planned.mode, model, how)
            except RequestError as error:
                if not planned.is_of_suite:
                    raise
                note(f"left out: {error}")
                continue
            if dry_run:
                for text in session.rendered(model, planned.mode, planned.items, how):
                    print(text)
            else:
                found.append(run_task(model, described, planned, how, output, as_json))
    return found


def run_task(model: Model, described: dict[str, Any], planned: Planned, how: How, output: Path, as_json: bool) -> RunFile:
    """Run one task, or what a kill has left of it, and show it. Raises GemcutterError."""
    from gemcutter.evals import records, report, session
    from gemcutter.evals.run import run

    task, mode, items, asked = planned.task, planned.mode, planned.items, planned.asked
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
