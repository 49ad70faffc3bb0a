"""`gemcutter doctor`: what is in a checkpoint, what is wrong with it, and who can load it.

Owns the words and tables; `checkpoint/doctor/doctor.py` owns the report, which --json prints as it is. The exit code is for
scripts: 0 fine, 1 it loads but there are remarks, 2 it does not load. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.checkpoint.remote.hub import locate
from gemcutter.cli import options
from gemcutter.cli.terminal import progress, spell_bytes, spell_count, spell_tower, tables

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from gemcutter.checkpoint.doctor.doctor import TextReport
    from gemcutter.checkpoint.load.match import Checkpoint

HELP = """
Say what is in a checkpoint, what is wrong with it, and who can load it.

SOURCE is a folder, a file, a hub id, or the web address of a file, a folder or a page of the hub. Towers for images and sounds
are checked as loading them does, in the model's own files or in a projector: the one beside a GGUF model, or --mmproj. A
projector can be looked at by itself, too. Only headers and small files
are read: a few kilobytes of a remote checkpoint, never its weights, unless --data asks for them. Other engines are judged by
rules with public sources; where no rule speaks, the verdict is unknown.

The exit code is 0 if all is well, 1 if the checkpoint loads but there are remarks, 2 if it does not load.
"""
EXAMPLES = """\b
Examples:
  gemcutter doctor ./gemma-4-E2B-it
  gemcutter doctor google/gemma-4-E2B-it
  gemcutter doctor https://example.org/models/gemma/model.safetensors
  gemcutter doctor ./my-finetune --json | jq .problems
  gemcutter doctor ./my-merge --data       (reads every value)
  gemcutter doctor ./mmproj-BF16.gguf      (a projector by itself)
"""
STATUS = {
    "fine": ("fine", "green"),
    "remarks": ("loads, with remarks", "yellow"),
    "broken": ("does not load", "red"),
    "unreadable": ("can't be read", "red"),
}
ROOMY_COLUMNS = 120  # of a terminal, from which on versions and reasons get columns of their own
SHOWN = 20  # problems of one kind; --json has all

SourceName = Annotated[
    str,
    typer.Argument(metavar="SOURCE", help='Folder, file, hub id (owner/name), http(s) address, or "demo".', show_default=False),
]


Data = Annotated[bool, typer.Option("--data", help="Read all values too: NaN, infinity, constant rows, scales out of range.")]


def doctor(
    source: SourceName,
    as_json: options.Json = False,
    ignore: options.Ignore = None,
    data: Data = False,
    mmproj: options.Mmproj = None,
) -> None:
    """Print the report on one checkpoint and exit with its code."""
    from gemcutter.checkpoint.doctor.doctor import examine  # which knows the web, and takes as long to import as all the rest

    projector = None if mmproj is None else locate(mmproj)
    if data:
        with progress("reading values") as advance:
            found = examine(source, tuple(ignore or ()), read_text, data=True, progress=advance, mmproj=projector)
    else:
        found = examine(source, tuple(ignore or ()), read_text, mmproj=projector)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show(found)
    if found["exit_code"]:
        raise typer.Exit(found["exit_code"])


def read_text(checkpoint: Checkpoint, towers: Sequence[str] = ()) -> TextReport:
    """Read the text side of a checkpoint, which has towers of these names, as loading does. Raises what that raises."""
    from gemcutter.checkpoint.doctor.doctor import TextReport
    from gemcutter.text_assets import read_text_assets

    text = read_text_assets(checkpoint)
    if towers:
        from gemcutter.media_parts import find_markers

        find_markers(text.tokenizer, "vision" in towers, "audio" in towers)
    return TextReport(text.notes, text.defaults.stops)


def show(found: dict[str, Any]) -> None:
    """Print the report as text and tables on stdout."""
    with tables(160) as console:
        _show(found, console)


def _show(found: dict[str, Any], console: Console) -> None:
    verdict, style = STATUS[found["status"]]
    console.print(f"{found['source']}: {verdict}", style=f"bold {style}")
    for line in _head(found):
        console.print(line)
    _list(console, "Problems", [f"{each['kind']:10} {each['text']}" for each in _few(found["problems"])], "red")
    _list(console, "Remarks", found["remarks"], "yellow")
    sources = list(dict.fromkeys(address for each in found["verdicts"] for address in each["threads"]))
    for table in (_layers(found["layers"]), _roles(found["roles"]), _verdicts(found["verdicts"], sources, console.width)):
        if table is not None:
            console.print()
            console.print(table)
    unknown = [each["engine"] for each in found["verdicts"] if each["verdict"] == "unknown"]
    if unknown:
        console.print(f"unknown, for no rule speaks of them: {', '.join(unknown)}")
    for number, address in enumerate(sources, 1):
        console.print(f"  [{number}] {address}", style="dim", soft_wrap=True)


def _head(found: dict[str, Any]) -> Iterator[str]:
    if found["format"]:
        files = found["files"]
        names = files[0]["name"] if len(files) == 1 else f"{len(files)} files"
        yield f"  format      {found['format']}: {names}, {found['tensors']} tensors, {spell_bytes(found['tensor_bytes'])}"
    if found["received"]:
        share = found["received"]["bytes"] / max(found["tensor_bytes"], 1)
        yield (
            f"  read        {spell_bytes(found['received']['bytes'])} in {found['received']['requests']} requests ({share:.2%})"
        )
    if found["dtypes"]:
        shares = ", ".join(f"{row['dtype']} {spell_bytes(row['bytes'])}" for row in found["dtypes"])
        yield f"  stored as   {shares}"
    if found["model"]:
        yield from _model(found["model"])
    if found["redundant"]:
        size = spell_bytes(sum(row["bytes"] for row in found["redundant"]))
        yield f"  redundant   {len(found['redundant'])} tensors, {size}"
    for tower in found["towers"]:
        yield f"  {tower['name']:<11} {spell_tower(tower)}"
    described = {f"{tower['name']} tower" for tower in found["towers"]}
    for kind, pile in found["left_aside"].items():
        if kind in described:
            continue
        yield f"  aside       {kind}: {pile['tensors']} tensors, {spell_bytes(pile['bytes'])}"
    if found["text"]:
        yield from _text(found["text"], found["stops"])


def _model(model: dict[str, Any]) -> Iterator[str]:
    experts, kind = model["experts"], "drafter" if model["is_drafter"] else "decoder"
    yield f"  model       {model['model_type']}, a {kind} of {spell_count(model['parameters'])} parameters"
    extras = [f"{model['readers']} of them read others' keys and values"] if model["readers"] else []
    extras += [f"{experts['top_k']} of {experts['count']} experts"] if experts else []
    extras += [f"per-layer embeddings of {model['ple_dim']}"] if model["ple_dim"] else []
    yield f"  layers      {', '.join([str(model['layers']), *extras])}; window {model['window']}, context {model['context']}"


def _text(text: dict[str, Any], stops: Sequence[dict[str, Any]]) -> Iterator[str]:
    size = f" ({spell_bytes(text['tokenizer_bytes'])})" if text["tokenizer_bytes"] else ""
    yield f"  tokenizer   {text['tokenizer'] or 'absent'}{size}, chat template {text['template'] or 'absent'}"
    named = [f"{stop['id']} ({', '.join(stop['asked_by'])})" for stop in stops] or list(map(str, text["eos_token_ids"]))
    yield f"  ends on     {', '.join(named) or 'nothing that the files name'}"


def _few(problems: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    """Keep the first problems of each kind, and count the others."""
    for kind in dict.fromkeys(each["kind"] for each in problems):
        same = [each for each in problems if each["kind"] == kind]
        yield from same[:SHOWN]
        if len(same) > SHOWN:
            yield {"kind": kind, "text": f"and {len(same) - SHOWN} more; --json lists all"}


def _list(console: Console, title: str, lines: Sequence[str], style: str) -> None:
    if lines:
        console.print()
        console.print(title, style=f"bold {style}")
    for line in lines:
        console.print(f"  {line}", soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True
    )
    for column in columns:
        table.add_column(column.strip("<>"), justify="right" if column.startswith(">") else "left")
    return table


def _layers(layers: Sequence[dict[str, Any]]) -> Table | None:
    """Draw layers together that own and read the same."""
    from gemcutter.checkpoint.doctor.doctor import spell_ranges

    if not layers:
        return None
    table = _table("Layers", "layers", "attention", "owns", "reads", ">MLP", ">tensors", ">bytes", ">missing", ">redundant")
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in layers:
        groups.setdefault((row["attention"], *row["owns"], row["reads"], row["mlp_width"]), []).append(row)
    for rows in groups.values():
        first, spare = rows[0], sum(row["redundant"]["bytes"] for row in rows)
        owns = " ".join(first["owns"]) + (", v = k" if first["owns"] == ["q", "k"] else "")
        reads = first["reads"] if isinstance(first["reads"], str) else f"layer {first['reads']}"
        table.add_row(
            spell_ranges([row["index"] for row in rows]),
            *(first["attention"], owns, reads, str(first["mlp_width"])),
            str(sum(row["tensors"] for row in rows)),
            spell_bytes(sum(row["bytes"] for row in rows)),
            str(sum(row["missing"] for row in rows) or "-"),
            spell_bytes(spare) if spare else "-",
        )
    return table


def _roles(roles: Sequence[dict[str, Any]]) -> Table | None:
    if not roles:
        return None
    table = _table("Weights by role", "role", "stored as", ">tensors", ">bytes", ">bits a weight")
    for row in roles:
        for index, stored in enumerate(row["stored"]):
            role = row["role"].replace("_", " ") if index == 0 else ""
            table.add_row(
                *(role, stored["dtype"], str(stored["tensors"]), spell_bytes(stored["bytes"]), f"{stored['bits_per_weight']:.2f}")
            )
    return table


def _verdicts(verdicts: Sequence[dict[str, Any]], sources: Sequence[str], width: int) -> Table | None:
    """Draw a column for each fact, or one for all that is said of a verdict where columns would be too narrow for words."""
    spoken = [each for each in verdicts if each["verdict"] != "unknown"]
    if not spoken:
        return None
    is_wide = width >= ROOMY_COLUMNS
    table = _table("Who can load it", "engine", "verdict", *(("versions", "why", "see") if is_wide else ("versions, and why",)))
    for each in spoken:
        numbers = " ".join(f"[{sources.index(address) + 1}]" for address in each["threads"])
        if is_wide:
            table.add_row(each["engine"], each["verdict"], each["versions"], each["why"] or "", numbers)
        else:
            said = f"{each['versions']}: {each['why']}" if each["why"] else each["versions"]
            table.add_row(each["engine"], each["verdict"], f"{said} {numbers}".strip())
    return table
