"""`gemcutter verify`: does this configuration compute what it should?

Owns the options, what a reader sees of a certificate, and the exit code: 0 for a pass, 1 for a failure. Refuses to know how a
certificate is made; read `gemcutter/parity/certificate.py` for that.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gemcutter.checkpoint.write.write_safetensors import write_json
from gemcutter.cli import options
from gemcutter.cli.failure import FAILED, UsageError
from gemcutter.cli.loading import load_model
from gemcutter.cli.score import read_text
from gemcutter.cli.terminal import progress

if TYPE_CHECKING:
    from gemcutter.parity.certificate import Side

HELP = """
Compare two ways of computing the same model, and certify that they agree.

The same tokens run through MODEL as the options say and, by default, through the plain reference kernels in float32. --against
transformers takes that library, in float32, for the other side; --against PATH another checkpoint of the same model, such as the
one that MODEL was quantized from, on the reference kernels in float32. Both sides take --device, --threads and --ignore. No row
is left out, the last 16 tokens run one at a time, and unwritten cache holds NaN.

--adapter is merged on both sides, unless --against-adapter says otherwise: none compares an adapted model with its base, which
shows how far the adapter moves it (a FAIL is then what one expects), PATH puts another adapter on the other side, such as the one
that MODEL was merged with.

Measured are the largest difference of a logit, KL(other || ours), how often both prefer the same token, the negative
log-likelihoods, and every layer's drift: the norm of the difference over the norm of the other side's row, averaged over at most
256 rows. The first layer whose drift exceeds its limit is named. Limits depend on what the sides do not share: equal weights in
float32 on both sides must agree within rounding, so --dtype float32 shows nearly every mistake; bfloat16, 8-bit and 4-bit weights
may differ as such numbers do, and what is smaller than that stays hidden. Exit code 0 means that all limits hold, 1 that one does
not.

--json and --out give a certificate whose key is a hash over the checkpoint's headers and a sample of every tensor's bytes.
An adapter is named in it, but no part of the key.
"""
EXAMPLES = """\b
Examples:
  gemcutter verify demo
  gemcutter verify demo --dtype float32 --against transformers
  gemcutter verify ./gemma-4-E2B-it-4bit --against google/gemma-4-E2B-it --out certificate.json
  gemcutter verify demo --quant q4 --text README.md --tokens 512 --json
  gemcutter verify ./base --adapter ./my-adapter --against-adapter none
  gemcutter verify ./merged --against ./base --against-adapter ./my-adapter
"""
REFERENCE, TRANSFORMERS, NO_ADAPTER = "reference", "transformers", "none"
_NO_NUMBER = "not a number"
# What a reader sees of a measure: its name, and how to spell a number of it.
SPELLED = {
    "max_abs_logit_difference": ("largest difference of a logit", "{:.3g}"),
    "mean_kl_nats": ("mean KL, nats a token", "{:.3g}"),
    "nll_difference_nats": ("difference of likelihood, nats a token", "{:.3g}"),
    "layer_drift": ("largest drift of a layer", "{:.3g}"),
    "top1_agreement": ("same best token", "{:.2%}"),
}

Against = Annotated[
    str, typer.Option(metavar="reference|transformers|PATH", help="The other side; PATH is anything that MODEL can be.")
]
AgainstAdapter = Annotated[
    str | None,
    typer.Option(
        metavar="none|PATH", help="The adapter that is merged on the other side.  [default: --adapter's]", show_default=False
    ),
]
Text = Annotated[str | None, typer.Option(metavar="FILE", help='UTF-8 text; "-" is stdin.  [default: one that is built in]')]
Tokens = Annotated[
    int | None,
    typer.Option(metavar="N", help="Tokens at most.  [default: 192 more than the model's window]", show_default=False),
]
Out = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the certificate here, as JSON.")]


@options.spread
def verify(
    model: options.Model,
    *,
    against: Against = REFERENCE,
    against_adapter: AgainstAdapter = None,
    text: Text = None,
    tokens: Tokens = None,
    loading: options.Loading,
    as_json: options.Json = False,
    out: Out = None,
) -> None:
    """Make a certificate, print it, and exit with 1 unless it passes. Raises UsageError or GemcutterError."""
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"--out: {out.parent} is no folder")
    their_adapter = choose_adapter(loading.adapter, against_adapter)
    if against == TRANSFORMERS and their_adapter is not None:
        raise UsageError(
            "an adapter can't go with --against transformers, which runs the checkpoint without it; "
            "--against-adapter none compares with that"
        )
    body = None if text is None else read_text(text)

    from gemcutter.parity.certificate import BUILT_IN, certify, encode

    other = replace(plainly(loading), adapter=their_adapter)
    theirs = None if against == TRANSFORMERS else load_side(model if against == REFERENCE else against, other)
    ours = load_side(model, loading)
    found = certify(ours, theirs, encode(ours, theirs, body, tokens), progress, text or BUILT_IN)
    if out is not None:
        write_json(out, found)
    if as_json:
        print(json.dumps(found))
    else:
        show(found)
    if not found["passed"]:
        raise typer.Exit(FAILED)


# ---- the sides ----


def choose_adapter(ours: str | None, asked: str | None) -> str | None:
    """Return the other side's adapter: ours, unless another one or "none" is asked for."""
    return ours if asked is None else None if asked.lower() == NO_ADAPTER else asked


def plainly(loading: options.Loading) -> options.Loading:
    """Return how the other side is loaded: what is computed and where stay the same, how it is computed is plain."""
    return options.Loading(
        dtype="float32",
        device=loading.device,
        kernels="reference",
        threads=loading.threads,
        ignore=loading.ignore,
        adapter=loading.adapter,
    )


def load_side(name: str, loading: options.Loading) -> Side:
    """Load one side; a certificate knows it by its name and its adapter's. Raises GemcutterError."""
    from gemcutter.parity.certificate import Side

    known = name if loading.adapter is None else f"{name} with {loading.adapter}"
    model = load_model(name, loading, context=1)  # its engine never runs: a certificate has a cache of its own, hence no --kv
    return Side(known, model, loading.kernels, loading.quant, loading.adapter)


# ---- what a reader sees ----


def show(found: dict[str, Any]) -> None:
    """Print a certificate for a reader."""
    text = found["text"]
    print(f"model    {found['ours']['model']}, sampled sha256 {found['sampled_sha256'][:16]}")
    print(f"ours     {_spell_side(found['ours'])}")
    print(f"against  {_spell_side(found['against'])}")
    if adapters := _spell_adapters(found["ours"]["adapter"], found["against"].get("adapter")):
        print(f"adapter  {adapters}")
    print(f"text     {text['source']}, {text['tokens']} tokens, the last {text['single_rows']} one at a time")
    if not text["is_longer_than_window"]:
        print(f"         not longer than the window of {text['window']}: no layer had to let go of a key")
    print(f"limits   {found['limits']}: {found['limits_because']}")
    print()
    for check in found["checks"]:
        label, number = SPELLED[check["measure"]]
        value = _NO_NUMBER if check["found"] is None else number.format(check["found"])
        side = "at least" if check["measure"] == "top1_agreement" else "at most"
        print(f"{'ok  ' if check['passed'] else 'FAIL'}  {label:<40}{value:>12}   {side} {number.format(check['limit'])}")
    print()
    nll = found["nll_nats"]
    print(f"negative log-likelihood, nats a token: {_nll(nll['ours'])} here, {_nll(nll['against'])} there")
    worst = found["worst_position"]
    print(f"most different: position {worst['position']}, with a KL of {_number(worst['kl_nats'], unit=' nats')}")
    _show_layers(found)
    print("PASS" if found["passed"] else "FAIL")


def _show_layers(found: dict[str, Any]) -> None:
    """Print the first layer that drifts; a failure lists every layer: drift adds up, and its jumps tell more than a limit."""
    first = found["first_divergent_layer"]
    if first is not None:
        print(f"first divergent layer: {first}")
    elif not found["passed"]:
        print("no layer drifts beyond its limit; small drifts have added up, or it is the norm or head after the last layer")
    if not found["passed"]:
        print("drift by layer: " + ", ".join(f"{layer['layer']}: {_number(layer['mean'], 2)}" for layer in found["layers"]))


def _spell_side(side: dict[str, Any]) -> str:
    if "kernels_by_op" not in side:
        return f"{side['engine']}, {side['dtype']}"
    quantized = f", quantized to {side['quant']}" if side["quant"] else ""
    chosen = {f"{op} {name}" for op, names in side["kernels_by_op"].items() for name in names if name != "reference"}
    fast = f" ({', '.join(sorted(chosen))})" if chosen else ""
    return f"{side['model']}{quantized} in {side['dtype']} on {side['device']}, {side['kernels']} kernels{fast}"


def _spell_adapters(ours: str | None, theirs: str | None) -> str | None:
    """Format which side has which adapter; None where neither has one."""
    if ours == theirs:
        return ours and f"{ours} on both sides, so its effect does not show; --against-adapter none compares with the base"
    return f"{ours or 'none'} here, {theirs or 'none'} there"


def _number(value: float | None, digits: int = 4, unit: str = "") -> str:
    return _NO_NUMBER if value is None else f"{value:.{digits}g}{unit}"


def _nll(value: float | None) -> str:
    return _NO_NUMBER if value is None else f"{value:.4f}"  # both sides with as many decimals, so that they can be subtracted
