"""Everything that is worth knowing of a GPU, in one call: checks first, then times, each beside its floor.

Owns the list of what is checked (fused norms against the reference, whole models against the reference and transformers, all on
the same device) and timed (fused norms against separate launches, attention and products against the bytes they must read, whole
models in batches, transformers beside them), and the JSON in `results/gpu/`. Refuses to measure what fails its check. Without a
GPU, `--device cpu` runs the checks, and the models that `--presets` names, on the CPU's kernels.

    python bench/gpu.py --presets E2B E4B 12B 26B-A4B 31B --quants bf16 q4_0
    python bench/gpu.py --write          put the newest result's tables into the README
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as `python -m bench.gpu` has it

from bench.gpu_kernels import check_norms, time_kernels
from gemcutter import api
from gemcutter.benchmark import hardware
from gemcutter.benchmark.harness import list_cases
from gemcutter.benchmark.report import measure
from gemcutter.benchmark.target import from_preset
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.errors import GemcutterError
from gemcutter.load_options import LoadOptions
from gemcutter.loading import find_device
from gemcutter.parity.passage import PASSAGE

HERE = Path(__file__).parent
RESULTS, README = HERE / "results" / "gpu", HERE.parent / "README.md"
BEGIN, END = "<!-- gpu:begin -->", "<!-- gpu:end -->"
TINY_A = HERE.parent / "tests" / "goldens" / "tiny-a"
PRESETS, QUANTS = ("E2B", "E4B", "12B", "26B-A4B", "31B"), ("bf16", "q4_0")
NLL_LIMIT = 5e-3  # relative to another way in the same dtype on the same device
NLL_TOKENS = 256


def check_models(device: str) -> Iterator[dict[str, Any]]:
    """Compare the negative log-likelihood of a text under the fast kernels with others', all in bfloat16 on one device."""
    for folder in (DEMO_FOLDER, TINY_A):
        nll = _nll(folder, device, "auto")
        others = {"the reference": _nll(folder, device, "reference")}
        if find_spec("transformers") is not None:
            others["transformers"] = _nll_of_transformers(folder, device)
        for name, wanted in others.items():
            error = abs(nll / wanted - 1)
            yield {
                "check": f"NLL of {folder.name} against {name}", "error": error, "limit": NLL_LIMIT, "is_good": error <= NLL_LIMIT
            }  # fmt: skip


def _ids(model: api.Model) -> list[int]:
    return list(model.tokenizer.encode(PASSAGE, bos=True)[:NLL_TOKENS])


def _nll(folder: Path, device: str, kernels: str) -> float:
    model = api.load(str(folder), dtype="bfloat16", device=device, kernels=kernels, context=NLL_TOKENS)
    found = model.stream(_ids(model), max_tokens=0, prompt_logprobs=0).finish().prompt.logprobs
    return -sum(each.logprob for each in found) / len(found)


@torch.inference_mode()
def _nll_of_transformers(folder: Path, device: str) -> float:
    from transformers import AutoModelForCausalLM

    ids = torch.tensor([_ids(api.load(str(folder)))], device=device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True).to(device).eval()
    logits_RV = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
    return float(torch.nn.functional.cross_entropy(logits_RV, ids[0, 1:]))


def time_model(preset: str, quant: str, device: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """Measure one geometry: prompts, and replies in batches."""
    subject = from_preset(preset, quant, None, LoadOptions(model=preset, device=device))
    tests = list_cases(sizes.prompt, sizes.tokens, [0], sizes.batch)
    found = measure(subject, tests, sizes.rounds, max_rows=max([*sizes.prompt, 512]))
    for row in found["rows"]:
        row["ms_a_step"] = 1e3 * row["batch"] / row["tok_s"]
        row["floor_ms"] = 1e3 * row["batch"] / row["ceiling_tok_s"]
    return found


def time_peer(preset: str, sizes: argparse.Namespace) -> dict[str, Any]:
    """Run transformers on the same geometry in a process of its own; what goes wrong is the result then."""
    command = [sys.executable, str(HERE / "engines" / "gpu_transformers.py"), preset]
    command += ["-p", *map(str, sizes.prompt), "-n", *map(str, sizes.tokens), "--batch", *map(str, sizes.batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"problem": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Check, then time. What fails a check is named, and nothing is timed then."""
    place = find_device(LoadOptions(model="a preset", device=options.device))
    found: dict[str, Any] = {"date": date.today().isoformat(), "machine": hardware.describe(place), "models": [], "kernels": []}
    found["checks"] = [*check_norms(place), *check_models(options.device)]
    bad = [check for check in found["checks"] if not check["is_good"]]
    for check in bad:
        print(f"failed: {check['check']}: error {check['error']:.2g}, limit {check['limit']:.2g}", file=sys.stderr)
    if bad:
        return found
    if place.type == "cuda":
        found["kernels"] = list(time_kernels(place))
    for preset in options.presets:
        for quant in options.quants:
            gc.collect()
            if place.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats(place)
            found["models"].append(_tried(f"{preset} {quant}", lambda: time_model(preset, quant, options.device, options)))  # noqa: B023
        if place.type == "cuda" and options.peer:
            found["models"][-1]["transformers"] = time_peer(preset, options)
    return found


def _tried(name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure, or say why not: a model that is too large must not cost the results of all others."""
    try:
        return work() | {"name": name}
    except (GemcutterError, torch.OutOfMemoryError) as error:
        return {"name": name, "problem": str(error).splitlines()[0], "rows": []}


def tables(found: dict[str, Any]) -> str:
    """Lay a result out for a reader."""
    here = found["machine"]
    lines = [
        f"Measured on {found['date']} by `bench/gpu.py` on {here.get('gpu', here['cpu'])} (torch {here['torch']}): milliseconds "
        "of a step, of prompts of a token; the floor that bytes or operations allow on this device, and the ratio of both.",
        "",
        "| model | test | ms | floor | over the floor | transformers |",
        "|---|---|---|---|---|---|",
    ]
    for model in found["models"]:
        peer = {row["test"]: row for row in model.get("transformers", {}).get("rows", ())}
        for row in model["rows"]:
            theirs = f"{peer[row['test']]['ms_a_step']:.2f}" if row["test"] in peer else "-"
            ratio = row["ms_a_step"] / row["floor_ms"]
            cells = (model["name"], row["test"], f"{row['ms_a_step']:.2f}", f"{row['floor_ms']:.2f}", f"{ratio:.2f}x", theirs)
            lines.append(f"| {' | '.join(cells)} |")
    lines += [
        f"| {model['name']} | not measured: {model['problem']} | | | | |" for model in found["models"] if "problem" in model
    ]
    if found["kernels"]:
        lines += ["", "| kernel | ms | floor | over the floor | in separate launches |", "|---|---|---|---|---|"]
    for kernel in found["kernels"]:
        apart = f"{kernel['apart_ms']:.3f}" if "apart_ms" in kernel else "-"
        cells = (f"{kernel['ms']:.3f}", f"{kernel['floor_ms']:.3f}", f"{kernel['ms'] / kernel['floor_ms']:.2f}x", apart)
        lines.append(f"| {kernel['kernel']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def write_readme() -> int:
    """Put the newest result's tables into the README."""
    paths = sorted(RESULTS.glob("*.json"))
    if not paths:
        print("there is no result of a GPU yet; run bench/gpu.py on one", file=sys.stderr)
        return 1
    before, _, rest = README.read_text().partition(BEGIN)
    made = tables(json.loads(paths[-1].read_text()))
    README.write_text(f"{before}{BEGIN}\n{made}\n{END}{rest.partition(END)[2]}")
    return 0


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for; give 1 where a check failed."""
    parser = argparse.ArgumentParser(description="Check and time gemcutter on a GPU.")
    parser.add_argument("--presets", nargs="*", default=PRESETS, help="geometries of synthetic models (default: all)")
    parser.add_argument("--quants", nargs="*", default=QUANTS, help="how their weights are stored (default: bf16 q4_0)")
    parser.add_argument("-p", "--prompt", nargs="*", type=int, default=[512, 4096])
    parser.add_argument("-n", "--tokens", nargs="*", type=int, default=[128])
    parser.add_argument("--batch", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("-r", "--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--no-peer", dest="peer", action="store_false", help="leave transformers out")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the JSON goes")
    parser.add_argument("--write", action="store_true", help="only put the newest tables into the README")
    options = parser.parse_args(arguments)
    if options.write:
        return write_readme()
    try:
        found = run(options)
    except GemcutterError as error:
        print(error, file=sys.stderr)
        return 1
    options.results.mkdir(parents=True, exist_ok=True)
    here = found["machine"]
    name = re.sub(r"[^a-z0-9]+", "-", here.get("gpu", here["cpu"]).lower()).strip("-")
    (options.results / f"{found['date']}-{name}.json").write_text(json.dumps(found, indent=1) + "\n")
    print(tables(found))
    return int(any(not check["is_good"] for check in found["checks"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
