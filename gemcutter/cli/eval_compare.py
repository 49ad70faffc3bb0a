"""`gemcutter eval --compare`: two models, two settings of one, or two files of runs.

Owns what B may differ in, the certificate beside the numbers, and what is printed. Read `gemcutter/evals/compare.py` for the
comparison, `verify.py` for certificates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemcutter.cli import options
from gemcutter.cli.eval import Asking, Side, run_tasks
from gemcutter.cli.failure import UsageError
from gemcutter.cli.terminal import note, print_json, progress
from gemcutter.cli.verify import load_side, show
from gemcutter.errors import GemcutterError

if TYPE_CHECKING:
    from gemcutter.evals.records import RunFile

SWITCHES = {"true": True, "false": False}
OF_LOADING = tuple(each.name for each in fields(options.Loading) if each.name not in ("threads", "ignore"))
OF_ENGINE = ("context", "kv", "max_num_seqs", "speculate", "draft_model", "draft_tokens")
WHOLE = ("context", "max_num_seqs", "draft_tokens")


def compare_runs(
    names: Sequence[str], side: Side, changes: Sequence[str], asking: Asking, output: Path, as_json: bool
) -> list[RunFile]:
    """Compare what two names stand for, print the result and return all runs. Raises UsageError or GemcutterError."""
    from gemcutter.evals.compare import compare, spell

    are_files = [Path(name).is_file() and name.endswith(".jsonl") for name in names]
    certificate: dict[str, Any] | None = None
    if all(are_files):
        runs = read_runs(names, changes, asking)
    elif any(are_files):
        raise UsageError("--compare takes two models or two files of runs, not one of each")
    else:
        if asking.task is None:
            raise UsageError("--compare asks models the tasks of --task; name one")
        first, second = side, changed(replace(side, model=names[1]), changes)
        if first == second:
            raise UsageError("both sides are the same; name another model, or what the second one has otherwise with --with")
        sides = [run_tasks(each, asking, output, dry_run=False, as_json=as_json) for each in (first, second)]
        runs = pair_up(*sides)
        certificate = certificate_of(first, second)
    found = [(one, compare(one, other)) for one, other in runs]
    if as_json:
        print_json({"comparisons": [{**_what(one), **each.as_json()} for one, each in found], "certificate": certificate})
    else:
        for one, each in found:
            print()
            print("\n".join(spell(one.header, each)))
        if certificate is not None:
            print("\ncertificate of the second model against the first\n")
            show(certificate)
    return [run for pair in runs for run in pair]


def _what(run: RunFile) -> dict[str, Any]:
    return {name: run.header[name] for name in ("task", "mode", "prompt_id", "items_sha256")}


def read_runs(names: Sequence[str], changes: Sequence[str], asking: Asking) -> list[tuple[RunFile, RunFile]]:
    """Read two files of runs. Raises UsageError or RequestError."""
    from gemcutter.evals import records

    if changes or asking.task:
        raise UsageError("files of runs are compared as they are; leave out --with and --task")
    first, second = (records.read(Path(name)) for name in names)
    return [(first, second)]


def pair_up(first: Sequence[RunFile], second: Sequence[RunFile]) -> list[tuple[RunFile, RunFile]]:
    """Return runs of the same task and mode; what a suite has left out on one side is told and passed over."""
    theirs = {(run.header["task"], run.header["mode"]): run for run in second}
    ours = {(run.header["task"], run.header["mode"]): run for run in first}
    for task, mode in ours.keys() ^ theirs.keys():
        note(f"{task}/{mode} is not compared: one of the models can't be asked it")
    return [(run, theirs[key]) for key, run in ours.items() if key in theirs]


def changed(side: Side, changes: Sequence[str]) -> Side:
    """Return a side with load options of its own, each KEY=VALUE; its runs are told apart by them. Raises UsageError."""
    found = dict[str, Any]()
    for text in changes:
        name, equals, value = text.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or name not in (*OF_LOADING, *OF_ENGINE):
            raise UsageError(f"--with: expected KEY=VALUE with one of {', '.join((*OF_LOADING, *OF_ENGINE))}, found {text!r}")
        found[name] = _value(name, value)
    loading = {name: value for name, value in found.items() if name in OF_LOADING}
    engine = {name: value for name, value in found.items() if name in OF_ENGINE}
    told = {name: value for name, value in found.items() if value is not None}
    return replace(side, loading=replace(side.loading, **loading), engine={**side.engine, **engine}, told=told)


def _value(name: str, text: str) -> Any:
    """Return an option's value; "none" is the default of those that may be left out. Raises UsageError."""
    if name == "repack_cache":
        if text.lower() not in SWITCHES:
            raise UsageError(f"--with {name}: expected true or false, found {text!r}")
        return SWITCHES[text.lower()]
    if text.lower() == "none" and name != "generation_config":
        return None
    if name in WHOLE:
        if not text.isdecimal():
            raise UsageError(f"--with {name}: expected an integer, found {text!r}")
        return int(text)
    return text


def certificate_of(first: Side, second: Side) -> dict[str, Any] | None:
    """Return the certificate of the second model against the first; None, with a note, where there can be none."""
    from gemcutter.parity.certificate import certify, encode

    try:
        theirs, ours = load_side(first.model, first.loading), load_side(second.model, second.loading)
        return certify(ours, theirs, encode(ours, theirs, None, None), progress)
    except GemcutterError as error:
        note(f"no certificate: {error}")
        return None
