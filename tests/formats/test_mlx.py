"""MLX checkpoints: real ones against what mlx-lm said of them, and written ones of every mode, width and prefix.

The written ones start from small random models (or the demo), are packed here, and must give bit for bit what a dense checkpoint
of the same dequantized values gives; `test_quant_*.py` hold dequantization itself against MLX. Read `formats/mlx.py` for the
rules and `test_mlx_broken.py` for what is refused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gemcutter import config as configs
from gemcutter import native
from gemcutter.checkpoint.container.source import Source
from gemcutter.checkpoint.container.stored_tensor import PackedTensor
from gemcutter.checkpoint.formats import mlx
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER
from gemcutter.checkpoint.write.synth import SIZES, spell_config, write_size
from gemcutter.cli.inspect import Use, describe
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request, RequestEvent
from gemcutter.model.text import Decoder
from gemcutter.plan import derive
from gemcutter.quant.affine import Affine
from gemcutter.quant.microscaling import Micro
from tests.mlx_files import Arrays, Recipe, Tensors, affine, convert, like_mlx, micro, misalign, schemes, small
from tests.trained import golden, trained

REAL = ["tiny-e-mlx-4bit", "tiny-e-mlx-8bit", "tiny-e-mlx-mxfp4", "tiny-a-mlx-4bit"]
TINY_A = Path(__file__).parents[1] / "goldens" / "tiny-a"


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: these models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Write the two sizes that have all traits between them."""
    folder = tmp_path_factory.mktemp("sizes")
    for like in ("E2B", "26B-A4B"):
        write_size(small(like), folder / like)
    return {like: folder / like for like in ("E2B", "26B-A4B")}


# ---- running ----


def run(engine: Engine, requests: list[Request]) -> list[list[RequestEvent]]:
    events: dict[int, list[RequestEvent]] = {engine.submit(request): [] for request in requests}
    while engine.has_work:
        for event in engine.step():
            events[event.request].append(event)
    return list(events.values())


def engine_of(checkpoint: Checkpoint, kernels: str = "reference") -> Engine:
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    return Engine(Decoder(checkpoint.plan, params, torch.float32, "cpu", kernels), 1024, max_batched_tokens=512, max_num_seqs=12)


def trace(folder: Path, tokens: int = 2) -> tuple[list[int | None], list[float]]:
    """Return the greedy reply to a prompt, and what every prompt token is worth."""
    checkpoint = open_checkpoint(folder)
    prompt = tuple(7 * index % min(checkpoint.plan.vocab, 4096) for index in range(1, 25))
    (events,) = run(engine_of(checkpoint), [Request(prompt, max_tokens=tokens, prompt_logprobs=0)])
    assert events[0].prompt is not None
    return [event.token for event in events], [entry.logprob for entry in events[0].prompt.logprobs]


# ---- real files ----


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_files_give_what_mlx_lm_gives(name: str) -> None:
    expected = golden(name)["float32_activations"]  # the bfloat16 run rounds coarsely
    passage = golden("prompts")["passage_600"]["token_ids"]
    engine = engine_of(open_checkpoint(trained(name)), "auto")
    prompts = expected["prompts"]
    assert len(prompts) == 12
    decoded = run(engine, [Request(tuple(each["token_ids"]), max_tokens=6, top_logits=10) for each in prompts])
    for each, events in zip(prompts, decoded, strict=True):
        assert [event.token for event in events] == each["greedy_ids"][:6], each["id"]
        assert events[0].prompt is not None
        ids, values = zip(*events[0].prompt.top_logits, strict=True)
        assert list(ids) == each["top10_ids"]
        # mlx-lm's run of mxfp4 differs by up to 0.004, its losses do not; it may keep something in bfloat16
        assert list(values) == pytest.approx(each["top10_logits"], abs=0.01 if "mxfp4" in name else 1e-4)
    whole = [Request((*each["token_ids"], *each["greedy_ids"]), max_tokens=0, prompt_logprobs=1) for each in prompts]
    for each, events in zip(prompts, run(engine, whole), strict=True):  # all 48 tokens at the price of a prefill
        assert events[0].prompt is not None
        best = [max(entry.top, key=lambda pair: pair[1])[0] for entry in events[0].prompt.logprobs]
        assert best[-48:] == each["greedy_ids"], each["id"]
    (events,) = run(engine, [Request(tuple(passage), max_tokens=0, prompt_logprobs=0)])
    assert events[0].prompt is not None
    logprobs = [entry.logprob for entry in events[0].prompt.logprobs]
    assert len(logprobs) == expected["passage_600"]["n_predicted"]
    assert -sum(logprobs) / len(logprobs) == pytest.approx(expected["passage_600"]["nll_mean"], rel=1e-4)


@pytest.mark.parametrize(
    ("name", "scheme", "router"),
    [
        (name, {"4bit": "affine4g64", "8bit": "affine8g64", "mxfp4": "mxfp4"}[name.rpartition("-")[2]], "affine8g64")
        for name in REAL
    ],
)
def test_real_files_stay_packed(name: str, scheme: str, router: str) -> None:
    checkpoint = open_checkpoint(trained(name))
    assert checkpoint.format == mlx.NAME
    assert checkpoint.config.quantization is None
    assert not checkpoint.matched.redundant
    for param, found in schemes(checkpoint).items():
        assert found == (router if param.endswith("moe.router") else scheme), param


def test_spelling_is_that_of_a_real_file() -> None:
    checkpoint = open_checkpoint(trained("tiny-a-mlx-4bit"))
    spelled = {
        mlx.spell(spec.name, part) for spec in checkpoint.plan.params() for part in ([part for part, _ in spec.parts] or [None])
    }
    assert spelled == {name for name in checkpoint.source.tensors if not name.endswith((".scales", ".biases"))}


# ---- the demo and tiny-a, packed here ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "bits"), [(DEMO_FOLDER, 4), (DEMO_FOLDER, 8), (TINY_A, 4)], ids=["tiny-e 4", "tiny-e 8", "tiny-a 4"]
)
def test_trained_models_give_what_their_values_give(folder: Path, bits: int, tmp_path: Path) -> None:
    packed, dense = convert(folder, tmp_path, lambda own: like_mlx(8 if "router" in own else bits, 64))
    assert (packed / "model.safetensors").stat().st_size < (bits + 0.9) / 16 * (folder / "model.safetensors").stat().st_size
    assert trace(packed, 12) == trace(dense, 12)


# ---- every mode, bits and group ----

RECIPES: dict[str, Recipe] = (
    {f"affine{bits}g{group}": affine(bits, group) for bits in (1, 2, 3, 4, 5, 6, 8) for group in (32, 64)}
    | {f"affine{bits}g{group}": affine(bits, group) for bits, group in ((4, 16), (3, 8), (8, 4))}
    | {scheme: micro(scheme) for scheme in ("mxfp4", "mxfp8", "nvfp4")}
)


@pytest.mark.parametrize("scheme", RECIPES)
def test_every_layout(scheme: str, sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """The PLE table, its projection and the embeddings included."""
    packed, dense = convert(sizes["E2B"], tmp_path, lambda own: RECIPES[scheme])
    found = schemes(open_checkpoint(packed))
    assert {"embed.tokens", "embed.ple", "ple.in", "layers.0.attn.in", "layers.14.mlp.out"} <= found.keys()
    assert set(found.values()) == {scheme}
    assert trace(packed) == trace(dense)


@pytest.mark.parametrize("like", ["E2B", "26B-A4B"])
def test_mixed_modes(like: str, sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """Every module in another mode, even the parts of one weight; the config knows of the least of it, as in the wild."""
    recipes = [RECIPES[scheme] for scheme in ("affine4g32", "affine8g32", "mxfp4", "affine3g32", "nvfp4", "affine6g32")]
    turn = iter(range(10**6))
    packed, dense = convert(
        sizes[like],
        tmp_path,
        lambda own: recipes[next(turn) % 6] if next(turn) % 14 else None,
        quantization={"group_size": 64, "bits": 4},
    )
    assert len(set(schemes(open_checkpoint(packed)).values())) >= 5
    assert trace(packed) == trace(dense)


def test_experts_may_be_dense(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """What mlx-lm writes without quantizing has its own names for experts."""
    packed, dense = convert(sizes["26B-A4B"], tmp_path, lambda own: None)
    assert open_checkpoint(packed).format == mlx.NAME
    assert trace(packed) == trace(dense)


def test_nvfp4_may_have_a_global_scale(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """One for each expert, too; a factor of one is spelled 2688, the largest scale times the largest code."""

    def recipe(x: Tensor) -> Arrays:
        arrays, _ = micro("nvfp4")(x)
        factors = 1.0 + torch.arange(len(x)) / 4 if x.ndim == 3 else torch.tensor(0.5)
        packed = Micro(
            "nvfp4", arrays["weight"].view(torch.uint8), arrays["scales"], factors.view(-1, 1, 1).expand(*x.shape[:-1], 1)
        )
        return arrays | {"global_scale": 2688 * factors}, packed.dequantize()

    packed, dense = convert(sizes["26B-A4B"], tmp_path, lambda own: recipe if "experts" in own else None)
    assert trace(packed) == trace(dense)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_files_that_mlx_writes(mode: str, sizes: Mapping[str, Path], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    sizes_of = {"affine": (32, 5), "mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}[mode]
    options = {"group_size": sizes_of[0], "bits": sizes_of[1], "mode": mode}
    tensors, expected = {}, {}
    for name, tensor in load_file(sizes["E2B"] / "model.safetensors").items():
        array = mx.array(tensor.float().numpy()).astype(mx.bfloat16)
        if tensor.ndim == 1:
            tensors[name] = array
            continue
        codes, *scales = mx.quantize(array, **options)
        for ending, stored in zip(("weight", "scales", "biases"), (codes, *scales), strict=False):
            tensors[f"{name.removesuffix('weight')}{ending}"] = stored
        wide = [each.astype(mx.float32) for each in scales] if mode == "affine" else scales  # or MLX computes in bfloat16
        expected[name] = torch.tensor(mx.dequantize(codes, *wide, **options, dtype=mx.float32).tolist())
    mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors, {"format": "mlx"})
    raw = json.loads((sizes["E2B"] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"quantization": options}))
    checkpoint = open_checkpoint(tmp_path)
    for pieces in checkpoint.matched.pieces.values():
        for piece in pieces:
            if isinstance(piece.data, PackedTensor):
                values = piece.data.build().dequantize()
                assert torch.equal(values, expected.pop(piece.data.name))
    assert not expected


# ---- prefixes, towers, shared layers ----


@pytest.mark.parametrize("prefix", ["model.", "language_model.model.", "language_model.", "model.language_model.", ""])
def test_every_prefix(prefix: str, sizes: Mapping[str, Path], tmp_path: Path) -> None:
    packed, dense = convert(
        sizes["26B-A4B"],
        tmp_path,
        lambda own: affine(8 if "router" in own else 4, 32),
        prefix=prefix,
        multimodal="language" in prefix,
        quantization={"bits": 4, "group_size": 32, f"{prefix}layers.0.router.proj": {"bits": 8, "group_size": 32}},
    )
    assert trace(packed) == trace(dense)


def test_a_tower_with_more_layers_than_the_decoder_is_left_aside(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """27 layers, dense and packed, whose names end like the decoder's, and a packed embedder without biases."""
    weight = torch.zeros(64, 64)
    extra = {
        f"{tower}.layers.{index}.self_attn.{proj}.{ending}": array.clone()
        for tower in ("vision_tower.encoder", "model.audio_tower")
        for index in range(27)
        for proj, recipe in (("k_proj", affine(4, 32)), ("v_proj.linear", None), ("k_norm", None))
        for ending, array in (recipe(weight)[0] if recipe else {"weight": weight}).items()
    }
    extra |= {f"embed_vision.embedding_projection.{end}": array for end, array in micro("mxfp4")(weight)[0].items()}
    claims = {
        "group_size": 32,
        "bits": 4,
        "vision_tower.encoder.layers.20.self_attn.k_proj": {"bits": 2},
        "vision_tower.x": False,
    }
    packed, dense = convert(
        sizes["E2B"],
        tmp_path,
        lambda own: affine(4, 32),
        prefix="language_model.model.",
        extra=extra,
        multimodal=True,
        quantization=claims,
    )
    checkpoint = open_checkpoint(packed)
    beside = checkpoint.matched.other_modules
    assert {kind: len(pieces) for kind, pieces in beside.items()} == {"vision tower": 27 * 5 + 2, "audio tower": 27 * 5}
    assert not checkpoint.matched.redundant
    assert trace(packed) == trace(dense)


@pytest.mark.parametrize("is_sound", [True, False], ids=["as converted early", "without companions"])
def test_keys_and_values_of_reader_layers_are_redundant(is_sound: bool, sizes: Mapping[str, Path], tmp_path: Path) -> None:
    """Early conversions carry all arrays of them, QAT conversions none; nobody reads them, so nobody judges them."""
    extra = Tensors()
    for index in range(10, 15):
        for own in ("k_proj", "v_proj"):
            arrays, _ = affine(4, 32)(torch.randn(32 if index == 14 else 16, 64))
            kept = arrays if is_sound else {"weight": arrays["weight"]}
            extra |= {f"model.layers.{index}.self_attn.{own}.{ending}": array for ending, array in kept.items()}
        extra[f"model.layers.{index}.self_attn.k_norm.weight"] = torch.full((32 if index == 14 else 16,), 9.0)
    packed, dense = convert(sizes["E2B"], tmp_path, lambda own: affine(4, 32), extra=extra)
    checkpoint = open_checkpoint(packed)
    assert {(piece.name, piece.part) for piece in checkpoint.matched.redundant} == {
        (f"layers.{index}.attn.{name}", part)
        for index in range(10, 15)
        for name, part in (("in", "k"), ("in", "v"), ("k_norm", None))
    }
    assert sum(piece.data.nbytes for piece in checkpoint.matched.redundant) == sum(array.nbytes for array in extra.values())
    assert trace(packed) == trace(dense)


def test_a_tied_head_is_redundant_and_an_untied_one_is_read(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    head, _ = affine(8, 32)(torch.randn(96, 64) / 8)
    extra = {f"language_model.lm_head.{ending}": array for ending, array in head.items()}
    for tied in (True, False):
        packed, _ = convert(sizes["E2B"], tmp_path / str(tied), lambda own: affine(4, 32), extra=extra, tie_word_embeddings=tied)
        checkpoint = open_checkpoint(packed)
        assert [piece.name for piece in checkpoint.matched.redundant] == (["head"] if tied else [])
        assert schemes(checkpoint).get("head") == (None if tied else "affine8g32")


# ---- memory ----


def test_misaligned_codes_are_used_in_place(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    packed, dense = convert(sizes["26B-A4B"], tmp_path, lambda own: affine(4, 32))
    misalign(packed / "model.safetensors")
    checkpoint = open_checkpoint(packed)
    assert all(tensor.offset % 2 for tensor in checkpoint.source.tensors.values())
    for pieces in checkpoint.matched.pieces.values():
        for data in [piece.data for piece in pieces if isinstance(piece.data, PackedTensor)]:
            weight = data.build()
            assert isinstance(weight, Affine)
            assert weight.codes.data_ptr() == data.stored[0].raw().data_ptr()
    assert trace(packed) == trace(dense)


PROBE = """
import json, sys, torch
from pathlib import Path
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import open_checkpoint
from gemcutter.engine.engine import Engine
from gemcutter.engine.request import Request
from gemcutter.model.text import Decoder
from gemcutter.checkpoint.remote.hub import DEMO_FOLDER

def status():
    lines = Path("/proc/self/status").read_text().splitlines()
    return {name: int(value.split()[0]) << 10 for name, _, value in (line.partition(":") for line in lines) if name[:3] == "Rss"}

def use(folder):
    checkpoint = open_checkpoint(Path(folder))
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    engine = Engine(Decoder(checkpoint.plan, params, torch.float32), context=64)
    loaded = status()
    engine.submit(Request(tuple(range(5, 21)), max_tokens=1))
    while engine.has_work:
        engine.step()
    return loaded, status(), engine

use(DEMO_FOLDER)  # code and what the library allocates once
before = status()
loaded, after, engine = use(sys.argv[1])
print(json.dumps([before, loaded, after]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident sets are read from Linux's /proc")
def test_what_is_resident_is_the_file(tmp_path: Path) -> None:
    """Four layers of E2B's widths, 4 bits in groups of 64, and the worst case: odd offsets, so that scales are copied."""
    packed = tmp_path
    raw = spell_config(replace(SIZES["E2B"], layers=4, period=2, readers=2, vocab=24576))
    tensors = Tensors()
    for spec in derive(configs.read(raw)).params():
        for part, rows in spec.parts or ((None, spec.shape[0]),):
            name, columns = mlx.spell(spec.name, part), spec.shape[-1]
            if len(spec.shape) == 1:
                tensors[name] = torch.ones(spec.shape, dtype=torch.bfloat16)
                continue
            tensors[name] = torch.randint(256, (rows, columns // 2), dtype=torch.uint8).view(torch.uint32)
            for ending, value in (("scales", 1 / 256), ("biases", -8 / 256)):
                tensors[f"{name.removesuffix('weight')}{ending}"] = torch.full((rows, columns // 64), value, dtype=torch.bfloat16)
    save_file(tensors, packed / "model.safetensors", {"format": "mlx"})
    (packed / "config.json").write_text(json.dumps(raw))
    misalign(packed / "model.safetensors")
    file_bytes = (packed / "model.safetensors").stat().st_size
    companions = sum(t.nbytes for name, t in Source.open(packed).tensors.items() if name.endswith((".scales", ".biases")))
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(packed)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    before, loaded, after = json.loads(done.stdout)
    print(file_bytes, companions, before, loaded, after)  # shown by pytest -s, and where the test fails
    tile = 24 << 20  # of a weight on its way to float32, with what that takes; activations; the cache
    assert file_bytes > 100 << 20
    assert loaded["RssAnon"] - before["RssAnon"] < companions + (8 << 20)
    assert after["RssAnon"] - before["RssAnon"] < companions + tile
    assert sum(after[key] - before[key] for key in ("RssAnon", "RssFile")) < 1.05 * file_bytes + tile


def test_headers_are_matched_without_torch(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    packed, _ = convert(sizes["E2B"], tmp_path, lambda own: affine(4, 32))
    code = (
        "import sys; from pathlib import Path; from gemcutter.checkpoint.load.match import open_checkpoint; "
        f"found = open_checkpoint(Path({str(packed)!r})); sys.exit('torch' in sys.modules or found.format != {mlx.NAME!r})"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0


def test_inspect_shows_what_is_packed(sizes: Mapping[str, Path], tmp_path: Path) -> None:
    packed, _ = convert(sizes["E2B"], tmp_path, lambda own: affine(4, 32))
    checkpoint = open_checkpoint(packed)
    found = describe(checkpoint, "any", (64,), Use("float32", "cpu", "auto"), {})
    assert (found["format"], found["stored_dtype"]) == (mlx.NAME, "affine4g32")
    assert found["weights"]["bytes"] == pytest.approx(checkpoint.source.total_bytes, abs=1)
    assert found["kernels"][0]["kernel"] == ("torch-chunked" if native.missing() else "native")
