"""Converts a checkpoint into another format, quantization or layout, some rows of a tensor in memory at a time.

Owns the run: what lies beside the tensors (config, tokenizer, manifest), the check that what was written reads back as the
same model, and that nothing stands under the final name before that. What becomes of each tensor is decided in
`conversion_plan.py`, its bytes are made in `tensor_writers.py`, names and configs are spelled in `formats/`. Refuses to know
source formats. Read `atomic_replace.py` for kills.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gemcutter
from gemcutter.checkpoint.container.lazy_tensor import tensor_nbytes
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.convert import projector_plan
from gemcutter.checkpoint.convert.conversion_plan import MODEL_DTYPES, ConvertOptions, Listing, list_outputs
from gemcutter.checkpoint.convert.tensor_writers import Output
from gemcutter.checkpoint.formats import gguf, gguf_metadata, hf_config
from gemcutter.checkpoint.formats.gguf_metadata import Entry
from gemcutter.checkpoint.formats.lora import Adapter, open_adapter
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.write.atomic_replace import MANIFEST, put_in_place
from gemcutter.checkpoint.write.write_gguf import tensor_nbytes as gguf_nbytes
from gemcutter.checkpoint.write.write_gguf import write_gguf
from gemcutter.checkpoint.write.write_safetensors import PYTORCH_METADATA, whole_file, write_all, write_json, write_sharded
from gemcutter.errors import CheckpointError
from gemcutter.sidecar.small_file import read_small
from gemcutter.sidecar.templates import ADDITIONAL, DEFAULT, JINJA, file_stem, find_templates

Progress = Callable[[int, int], None]  # bytes written, bytes in all
Texts = Callable[[Checkpoint], Mapping[str, bytes]]

TOKENIZER, TOKENIZER_CONFIG, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
# What is carried over from beside the weights.
SIDECAR_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    GENERATION,
    JINJA,
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "LICENSE",
    "NOTICE",
)
FAMILY = "gemma4"
GGUF_FILES = ("gguf", "mmproj")  # targets that are one GGUF file
HASH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Report:
    """What a conversion did, or would do: `deeds` counts the target's tensors by what was done to them."""

    target: Path
    to: str
    deeds: Mapping[str, int]
    types: Mapping[str, tuple[int, int]]  # tensors and bytes by how they are stored, the most bytes first
    dropped: Mapping[str, int]  # number of tensors by reason
    source_bytes: int
    target_bytes: int
    adapter_notes: Sequence[str] = ()

    def notes(self) -> list[str]:
        """Return what a user should know."""
        found = [*self.adapter_notes, *(f"{count} tensors left out: {why}" for why, count in self.dropped.items())]
        if again := self._count("requantized"):
            found.append(
                f"{again} matrices were quantized already, and again now: both errors add up; "
                "the unquantized checkpoint is a better source"
            )
        if (wide := self._count("dequantized")) and self.target_bytes > self.source_bytes:
            remedy = "--to mlx or gguf can keep weights packed" if self.to == "hf" else "--quant q4 or q8 packs them again"
            found.append(f"the target is larger than the source: {wide} packed matrices are dense in it; {remedy}")
        return found

    def _count(self, deed: str) -> int:
        return sum(count for each, count in self.deeds.items() if each.split()[-1] == deed)


def convert(
    source: Path,
    target: Path,
    to: str,
    quant: str = "none",
    shared_kv: str = "keep",
    *,
    adapter: Path | None = None,
    force: bool = False,
    ignore: Sequence[str] = (),
    texts: Texts | None = None,
    progress: Progress | None = None,
) -> Report:
    """Write the checkpoint `source` as `target`: a folder for "hf" and "mlx", a file that ends in .gguf for "gguf" and
    "mmproj", which holds the towers alone.

    `quant` is "none" (what is stored stays as it is where the target has a place for it, else becomes dense), "bf16", "f16", or a
    recipe of `quant/recipes.py` that the target can hold. `shared_kv` says what happens to keys and values of layers that read
    another layer's: "keep" what there is, "drop" it, or "restore" what there is not, as zeros. `adapter` is a LoRA adapter that
    is merged into the weights, in float32, before they are rounded or quantized. `texts` makes the tokenizer's files for a source
    that has none, such as a GGUF. `force` replaces an earlier target.

    Raises CheckpointError or ConfigError with everything that is wrong; then nothing stands under the target's name.
    """
    options = ConvertOptions(to, quant, shared_kv)
    _insist_on_options(source, target, options)
    work = _decide(open_checkpoint(source, ignore), options, target, adapter, ignore, progress)
    write = _write_gguf if to in GGUF_FILES else _write_folder
    with put_in_place(target, is_folder=to not in GGUF_FILES, force=force) as partial:
        write(work, partial, texts)
        _check_written(partial, work)
    return _report(work)


def preview(
    checkpoint: Checkpoint,
    target: Path,
    to: str,
    quant: str = "none",
    shared_kv: str = "keep",
    *,
    adapter: Path | None = None,
    ignore: Sequence[str] = (),
) -> Report:
    """Return what `convert` would report, from a checkpoint's headers, wherever it is; nothing is written. Raises the same."""
    options = ConvertOptions(to, quant, shared_kv)
    _insist_on_options(checkpoint.source.path, target, options)
    return _report(_decide(checkpoint, options, target, adapter, ignore))


def _insist_on_options(source: Path, target: Path, options: ConvertOptions) -> None:
    problems = options.problems() or _place_problems(source, target, options.to)
    if problems:
        raise CheckpointError(f"{source} can't be converted", problems)


def _decide(
    checkpoint: Checkpoint,
    options: ConvertOptions,
    target: Path,
    adapter: Path | None,
    ignore: Sequence[str],
    progress: Progress | None = None,
) -> _Work:
    """Decide everything from headers. Raises CheckpointError for what can't be converted or merged."""
    _insist_on_family(checkpoint, options.to)
    if options.to == "mmproj":
        if adapter is not None:
            raise CheckpointError(f"{adapter}: adapters change text models; a projector holds towers only")
        towers = projector_plan.find_towers(checkpoint, ignore)
        listing = projector_plan.list_outputs(checkpoint, options, towers)
        return _Work(checkpoint, options, listing, target, None, progress, towers)
    merged = None if adapter is None else open_adapter(adapter, checkpoint.plan, ignore)
    return _Work(checkpoint, options, list_outputs(checkpoint, options, merged), target, merged, progress)


@dataclass(frozen=True, slots=True)
class _Work:
    """Everything that is decided before the first byte is written."""

    checkpoint: Checkpoint
    options: ConvertOptions
    listing: Listing
    target: Path
    adapter: Adapter | None
    progress: Progress | None
    towers: projector_plan.Towers | None = None  # of which a projector is made


def _place_problems(source: Path, target: Path, to: str) -> list[str]:
    if (to in GGUF_FILES) != (target.suffix == ".gguf") or target.suffix == ".safetensors":
        wanted = "a file name that ends in .gguf" if to in GGUF_FILES else "the name of a folder"
        return [f"{target}: {wanted} expected for {to}"]
    here, there = source.resolve(), target.resolve()
    if here == there or there in here.parents:
        return [f"{target} holds the source itself; choose another name"]
    return []


def _insist_on_family(checkpoint: Checkpoint, to: str) -> None:
    kind = checkpoint.config.model_type
    if not kind.startswith(FAMILY):
        raise CheckpointError(
            f"{checkpoint.source.path} is a {kind} model; only Gemma 4 checkpoints are converted, Gemma 3 ones run as they are"
        )


# ---- folders of safetensors ----


def _write_folder(work: _Work, partial: Path, texts: Texts | None) -> None:
    ordered = sorted(work.listing.outputs, key=lambda output: -output.alignment)  # stable: no tensor is misaligned
    specs = [spec for output in ordered for spec in output.specs]
    metadata = {"format": "mlx"} if work.options.to == "mlx" else PYTORCH_METADATA
    write_sharded(partial, specs, _stream(ordered, _total(ordered, tensor_nbytes), work.progress), metadata)
    _copy_texts(work.checkpoint, partial, texts)
    write_json(partial / "config.json", _config(work))
    write_json(partial / MANIFEST, _manifest(work))


def _config(work: _Work) -> dict[str, Any]:
    checkpoint, listing = work.checkpoint, work.listing
    raw = None if checkpoint.format == gguf.NAME else checkpoint.source.read_json("config.json")
    if listing.is_verbatim and raw is not None:
        return raw
    dense = Counter[str]()
    for output in listing.outputs:
        for _, dtype, shape in output.specs:
            if dtype in MODEL_DTYPES.values():
                dense[dtype] += tensor_nbytes(dtype, shape)
    usual = dense.most_common(1)[0][0] if dense else "BF16"
    dtype = next(name for name, spelling in MODEL_DTYPES.items() if spelling == usual)
    if work.options.to == "hf":
        return hf_config.for_transformers(raw, checkpoint.config, checkpoint.plan, dtype, wraps=listing.wraps)
    return hf_config.for_mlx(raw, checkpoint.config, checkpoint.plan, dtype, _mlx_quantization(listing.outputs))


def _mlx_quantization(outputs: Sequence[Output]) -> dict[str, Any] | None:
    """Return the settings that most modules have, and those of every module that differs."""
    modules = {output.specs[0][0].removesuffix(".weight"): output.scheme for output in outputs if len(output.specs) == 3}
    if not modules:
        return None
    usual = Counter(modules.values()).most_common(1)[0][0]
    different = {module: _mlx_settings(scheme) for module, scheme in modules.items() if scheme != usual}
    return _mlx_settings(usual) | {"mode": "affine"} | different


def _mlx_settings(scheme: str) -> dict[str, Any]:
    bits, _, group = scheme.removeprefix("affine").partition("g")
    return {"group_size": int(group), "bits": int(bits)}


def _copy_texts(checkpoint: Checkpoint, folder: Path, texts: Texts | None) -> None:
    """Write what lies beside the weights: the source's files as they are, or what a GGUF's metadata says."""
    found: dict[str, bytes] = {}
    if checkpoint.format == gguf.NAME:
        generation = gguf.generation(checkpoint.source)
        for name, _, text in gguf.chat_templates(checkpoint.source):
            found[JINJA if name == DEFAULT else f"{ADDITIONAL}/{file_stem(name)}.jinja"] = text.encode("utf-8")
        found |= {} if texts is None else texts(checkpoint)
        if generation:
            write_json(folder / GENERATION, {"do_sample": True, **generation})
    for name in SIDECAR_FILES if not found else ():
        path = checkpoint.source.folder / name
        if path.is_file():
            try:
                found[name] = read_small(path)
            except ValueError as error:
                raise CheckpointError(f"{path} {error}; repair it, or remove it") from error
    if checkpoint.format != gguf.NAME:
        for name, (text, origin) in find_templates(checkpoint.source.folder).items():
            if Path(origin).parent.name == ADDITIONAL:
                found[f"{ADDITIONAL}/{name}.jinja"] = text.encode("utf-8")
    for name, content in found.items():
        (folder / name).parent.mkdir(exist_ok=True)
        with whole_file(folder / name) as file:
            write_all(file, folder / name, memoryview(content))


# ---- GGUF ----


def _write_gguf(work: _Work, partial: Path, texts: Texts | None) -> None:
    outputs, manifest = work.listing.outputs, _manifest(work)
    specs = [spec for output in outputs for spec in output.specs]
    entries: list[Entry] = [
        ("gemcutter.version", "str", gemcutter.__version__),
        ("gemcutter.source.sha256", "str", manifest["source"]["headers_sha256"]),
    ]
    metadata = _gguf_metadata(work) + entries
    write_gguf(partial, metadata, specs, _stream(outputs, _total(outputs, gguf_nbytes), work.progress))
    write_json(work.target.with_name(f"{work.target.stem}.{MANIFEST}"), manifest)


def _gguf_metadata(work: _Work) -> list[Entry]:
    checkpoint, source = work.checkpoint, work.checkpoint.source
    sizes = Counter[str]()
    for output in work.listing.outputs:
        for _, kind, shape in output.specs:
            sizes[kind] += gguf_nbytes(kind, shape)
    usual = sizes.most_common(1)[0][0]
    if work.towers is not None:
        return projector_plan.metadata(checkpoint, work.towers, usual)
    if checkpoint.format == gguf.NAME:
        decoder = gguf_metadata.describe(checkpoint.config, checkpoint.plan, source.files[0].stem, usual)
        return gguf_metadata.carried_over(source.metadata, decoder, is_copy=work.listing.is_verbatim)
    raw = source.read_json(TOKENIZER)
    if raw is None:
        raise CheckpointError(
            f"{source.folder} holds no {TOKENIZER}, which a GGUF file needs; copy it from the original checkpoint"
        )
    special = source.read_json(TOKENIZER_CONFIG) or {}
    return [
        *gguf_metadata.describe(checkpoint.config, checkpoint.plan, source.folder.resolve().name, usual),
        *gguf_metadata.tokenizer(raw, special, _templates(source), checkpoint.plan.vocab, str(source.folder / TOKENIZER)),
        *gguf_metadata.sampling(source.read_json(GENERATION) or {}),
    ]


def _templates(source: Source) -> dict[str, str]:
    """Return all chat templates by name."""
    return {name: text for name, (text, _) in find_templates(source.folder).items()}


# ---- what happens to all ----


def _total(outputs: Sequence[Output], nbytes: Callable[[str, tuple[int, ...]], int]) -> int:
    return sum(nbytes(kind, shape) for output in outputs for _, kind, shape in output.specs)


def _stream(outputs: Sequence[Output], total: int, progress: Progress | None) -> Iterator[memoryview]:
    done = 0
    for output in outputs:
        for chunk in output.chunks():
            done += chunk.nbytes
            yield chunk
            if progress is not None:
                progress(done, total)


def _check_written(partial: Path, work: _Work) -> None:
    """Read the headers of what was written: it must be the same model to this engine, whatever its spelling."""
    checkpoint = work.checkpoint
    if work.towers is not None:
        projector_plan.check_written(partial, checkpoint, work.towers)
        return
    again = open_checkpoint(partial)
    if again.format == gguf.NAME:  # whose text models say nothing about images; their rules go with the projector's file
        again = replace(again, plan=replace(again.plan, bidirectional=checkpoint.plan.bidirectional))
    if again.plan != checkpoint.plan:
        raise CheckpointError(
            f"{checkpoint.source.path}: its topology can't be spelled in the target's config, which would describe another model"
        )


def _manifest(work: _Work) -> dict[str, Any]:
    """Return what was done: from which headers, with which options, to which tensor."""
    source, options = work.checkpoint.source, work.options
    return {
        "gemcutter": gemcutter.__version__,
        "source": {
            "name": source.path.resolve().name,
            "format": work.checkpoint.format,
            "files": {file.name: file.stat().st_size for file in source.files},
            "headers_sha256": headers_sha256(source),
        },
        "options": {"to": options.to, "quant": options.quant, "shared_kv": options.shared_kv},
        **({} if work.adapter is None else {"adapter": _describe_adapter(work.adapter)}),
        "tensors": [
            {"name": output.specs[0][0], "from": list(output.sources), "deed": output.deed, "stored": output.scheme}
            for output in work.listing.outputs
        ],
        "dropped": [{"name": name, "why": why} for name, why in work.listing.dropped],
    }


def _describe_adapter(adapter: Adapter) -> dict[str, Any]:
    """Return what was merged: an adapter is small enough to be hashed whole."""
    file = adapter.factors[0].down.file
    with open(file, "rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return {"name": adapter.path.resolve().name, "sha256": digest, "changes": len(adapter.factors)}


def headers_sha256(source: Source) -> str:
    """Hash everything in a checkpoint's files that lies before their first tensor: names, shapes, places and metadata."""
    digest = hashlib.sha256()
    for path in source.files:
        tensors = [tensor for tensor in source.tensors.values() if tensor.file == path]
        left = min((tensor.offset for tensor in tensors), default=path.stat().st_size)
        with open(path, "rb") as file:
            while left > 0 and (content := file.read(min(left, HASH_BYTES))):
                digest.update(content)
                left -= len(content)
    return digest.hexdigest()


def _report(work: _Work) -> Report:
    outputs, adapter = work.listing.outputs, work.adapter
    nbytes = gguf_nbytes if work.options.to in GGUF_FILES else tensor_nbytes
    types: dict[str, tuple[int, int]] = {}
    for output in outputs:
        count, size = types.get(output.scheme, (0, 0))
        types[output.scheme] = count + 1, size + _total([output], nbytes)
    return Report(
        work.target,
        work.options.to,
        Counter(output.deed for output in outputs),
        dict(sorted(types.items(), key=lambda item: -item[1][1])),
        Counter(why for _, why in work.listing.dropped),
        work.checkpoint.source.total_bytes,
        _total(outputs, nbytes),
        [] if adapter is None else [f"adapter {adapter.path.name}: {len(adapter.factors)} changes merged", *adapter.notes()],
    )
