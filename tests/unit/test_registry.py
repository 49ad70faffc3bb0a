"""The choice of kernels: who is taken where, what the others said, and that asking needs no torch.

Owns no precision: `tests/kernels/test_providers.py` compares what the chosen functions compute.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemcutter import config as configs
from gemcutter import native
from gemcutter.checkpoint.write.synth import SIZES, spell_config
from gemcutter.errors import KernelError
from gemcutter.ops import DRAFTER_OPS, OPS, TOWER_OPS, KernelSite, backend, devices, registry
from gemcutter.ops.backend import KernelImpl
from gemcutter.ops.registry import CPU, IMPLEMENTATIONS, TRITON, Selection, explain, select_backend, select_kernel
from gemcutter.ops.triton import backend as triton_backend
from gemcutter.plan import ModelPlan, derive

F32, BF16, F16 = "float32", "bfloat16", "float16"
OLD, NEW = frozenset({"avx2", "fma"}), frozenset({"avx2", "avx512_bf16"})


def plan_of(like: str) -> ModelPlan:
    return derive(configs.read(spell_config(SIZES[like])))


def linear(device: str, dtype: str, stored: str, kernels: str = "auto") -> KernelSite:
    return KernelSite("linear", None, device, dtype, stored, kernels=kernels)


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code believe that the native kernels were not built."""
    monkeypatch.setattr(native, "missing", lambda: "not built")


@pytest.fixture
def with_native(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code believe that the native kernels are there."""
    monkeypatch.setattr(native, "missing", lambda: None)


@pytest.fixture
def no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code believe that Triton is not installed."""
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: None)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the code believe that Triton and a GPU are there."""
    monkeypatch.setattr(triton_backend, "find_spec", lambda name: name)
    monkeypatch.setattr(devices, "cuda_missing", lambda: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[[frozenset[str]], None]:
    """Let the code believe in a processor."""
    return lambda features: monkeypatch.setattr(backend, "cpu_features", lambda: features)


# ---- choices ----


@pytest.mark.parametrize(
    ("site", "features", "chosen", "reasons"),
    [
        (linear("cpu", F32, F32), OLD, "torch", ()),
        (linear("cpu", BF16, BF16), NEW, "torch", ()),
        (linear("cpu", BF16, BF16), frozenset({"amx_bf16"}), "torch", ()),
        (linear("cpu", BF16, BF16), frozenset({"asimd", "bf16"}), "torch", ()),
        (linear("cpu", BF16, BF16), OLD, "torch-chunked", ("this processor has no bfloat16 products",)),
        (linear("cpu", F32, BF16), NEW, "torch-chunked", ("weights stored as bfloat16 need converting to float32",)),
        (linear("cpu", BF16, F16), NEW, "torch-chunked", ("weights stored as float16 need converting to bfloat16",)),
        (linear("cuda", BF16, BF16), OLD, "torch", ()),
        (linear("cuda", F32, F32), OLD, "torch", ()),
        (linear("cpu", F32, F32, kernels="reference"), NEW, "reference", ("a row's last bits", "a row's last bits")),
        (linear("cpu", BF16, BF16, kernels="reference"), NEW, "reference", ("a row's last bits", "a row's last bits")),
        (linear("cpu", F32, BF16, kernels="reference"), OLD, "reference", ("need converting", "a row's last bits")),
        (
            linear("cuda", BF16, BF16, kernels="reference"),
            OLD,
            "reference",
            ("a row's last bits", "converts chunks of a weight on the CPU"),
        ),
        (replace(linear("cpu", BF16, BF16), op="attention"), OLD, "torch", ()),
        (replace(linear("cuda", BF16, BF16), op="attention"), OLD, "torch", ()),
        (replace(linear("cpu", BF16, BF16, kernels="reference"), op="attention"), NEW, "reference", ("a row's last bits",)),
    ],
)
@pytest.mark.usefixtures("no_native", "no_triton")
def test_choice_and_reasons(
    site: KernelSite,
    features: frozenset[str],
    chosen: str,
    reasons: tuple[str, ...],
    processor: Callable[[frozenset[str]], None],
) -> None:
    processor(features)
    choice = select_kernel(site)
    assert (choice.site, choice.impl.op, choice.impl.name) == (site, site.op, chosen)
    preferred = [impl.name for impl in IMPLEMENTATIONS if impl.op == site.op]
    assert [name for name, _ in choice.refusals] == preferred[: preferred.index(chosen)]
    first = "not built" if site.device == "cpu" else "runs on the CPU"
    second = "runs on CUDA" if site.device == "cpu" else "Triton is not installed"
    reasons = (*(("how many rows run beside it",) * 2 if site.invariant else (first, second)), *reasons)
    assert len(choice.refusals) == len(reasons)
    for (_, found), wanted in zip(choice.refusals, reasons, strict=True):
        assert wanted in found


NARROW = replace(plan_of("E2B").layers[0], head_dim=48)


@pytest.mark.usefixtures("with_native")
@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (linear("cpu", F32, F32), None),
        (linear("cpu", F32, "cpu-packed-Q4_0"), None),
        (linear("cpu", F32, "bfloat16+cpu-packed-Q4_0+cpu-packed-Q6_K"), None),
        (linear("cpu", F32, "mxfp8"), "no native layout for mxfp8"),
        (linear("cpu", F32, "mixed+cpu-packed-Q4_0"), "no native layout for mixed"),
        (linear("cpu", F32, "cpu-packed-gptq4-indexedz-apart"), None),
        (replace(linear("cpu", F32, "cpu-packed-gptq4-indexedz"), op="layer"), None),
        (replace(linear("cpu", F32, "cpu-packed-gptq4-indexedz"), op="embed"), "takes no rows in the order"),
        (replace(linear("cpu", F32, "cpu-packed-gptq4-indexedz-apart"), op="mlp"), "each in another way"),
        (linear("cuda", F32, F32), "runs on the CPU"),
        (linear("cpu", F32, F32, kernels="reference"), "how many rows run beside it"),
        (replace(linear("cpu", F32, BF16), op="mlp"), None),
        (replace(linear("cpu", F32, BF16, kernels="reference"), op="mlp"), "how many rows run beside it"),
        (replace(linear("cpu", F32, BF16), op="attention", layer=plan_of("E2B").layers[0]), None),
        (replace(linear("cpu", F32, BF16), op="attention", layer=NARROW), None),
        (replace(linear("cpu", F32, BF16), op="layer", layer=NARROW), None),
    ],
)
def test_native_kernels_come_first_and_say_why_not(site: KernelSite, reason: str | None) -> None:
    choice = select_kernel(site)
    if reason is None:
        assert (choice.impl.name, choice.refusals) == ("native", ())
    else:
        assert choice.impl.name != "native"
        assert choice.refusals[0][0] == "native"
        assert reason in choice.refusals[0][1]


@pytest.mark.usefixtures("with_triton", "no_native")
@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (linear("cuda", BF16, BF16), None),
        (linear("cuda", BF16, "bfloat16+gpu-packed-Q4_0"), None),
        (linear("cuda", BF16, "mixed"), None),
        (linear("cuda", BF16, "Q4_0"), "no Triton kernel for Q4_0"),
        (linear("cuda", BF16, BF16, "triton"), None),
        (linear("cuda", BF16, BF16, "reference"), "how many rows run beside it"),
        (linear("cpu", BF16, BF16), "runs on CUDA"),
        (replace(linear("cuda", BF16, BF16), op="mlp"), None),
        (replace(linear("cuda", BF16, BF16), op="attention", layer=NARROW), "head_dim 48 is none of 16, 32"),
        (replace(linear("cuda", BF16, BF16), op="layer", layer=NARROW), "head_dim 48 is none of 16, 32"),
        (replace(linear("cuda", BF16, BF16), op="qkv", layer=NARROW), None),
    ],
)
def test_triton_serves_a_gpu_and_says_why_not(site: KernelSite, reason: str | None) -> None:
    choice = select_kernel(site)
    assert (choice.impl.name == "triton") == (reason is None)
    assert reason is None or reason in dict(choice.refusals)["triton"]


@pytest.mark.usefixtures("with_triton", "with_native")
@pytest.mark.parametrize("op", OPS)
def test_triton_or_an_error(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks for Triton gets it, on a CPU under its interpreter, and is told where it can't be had."""
    layer = plan_of("E2B").layers[0]
    assert select_kernel(KernelSite(op, layer, "cuda", BF16, BF16, "triton")).impl.name == "triton"
    on_cpu = KernelSite(op, layer, "cpu", F32, BF16, "triton")
    if op != "layer":  # which nobody needs
        with pytest.raises(KernelError, match=f"no kernel for {op} on cpu") as caught:
            select_kernel(on_cpu)
        asked = [text for text in caught.value.problems if "Triton's kernels were asked for" in text]
        (triton,) = set(caught.value.problems) - set(asked)
        assert "only under TRITON_INTERPRET=1" in triton
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select_kernel(on_cpu).impl.name == "triton"
    assert select_kernel(replace(on_cpu, kernels="auto")).impl.name != "triton"


class Driver:
    """A CUDA driver that finds some devices of one capability, or fails."""

    def __init__(self, devices: int, capability: int, error: int = 0) -> None:
        self.devices, self.capability, self.error = devices, capability, error

    def cuInit(self, flags: int) -> int:
        return self.error

    def cuDeviceGetCount(self, found: Any) -> int:
        found._obj.value = self.devices
        return 0

    def cuDeviceGetAttribute(self, found: Any, attribute: int, device: int) -> int:
        assert (attribute, device) == (75, 0)
        found._obj.value = self.capability
        return 0


@pytest.mark.parametrize(
    ("driver", "reason"),
    [
        (Driver(2, 9), None),
        (Driver(1, 8), None),
        (Driver(1, 7), "its compute capability is 7.x, 8.0 is needed"),
        (Driver(0, 9), "this machine has no CUDA device"),
        (Driver(1, 9, error=100), "this machine has no CUDA device"),
        (None, "this machine has no CUDA driver"),
    ],
)
def test_the_driver_is_asked_for_a_gpu(driver: Driver | None, reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr("ctypes.CDLL", load)
    assert devices.cuda_missing.__wrapped__() == reason


@pytest.mark.usefixtures("with_native")
def test_native_kernels_keep_rows_in_float32_and_pack_weights() -> None:
    cpu = select_backend("cpu", "auto")
    assert cpu is CPU
    assert cpu.row_dtype(BF16) == F32
    assert select_backend("cpu", "reference").row_dtype(BF16) == select_backend("cuda", "auto").row_dtype(BF16) == BF16
    forms = [cpu.activations(dtype, asked) for dtype in (F32, BF16) for asked in (None, "int8", "bf16")]
    assert forms == ["float32", "int8", "bf16", "int8", "int8", "bf16"]
    assert select_backend("cuda", "auto").activations(BF16, None) == F32
    held = [cpu.packing(stored) for stored in ("Q4_0", "affine4g64", "mxfp8", "packed4-indexed", BF16)]
    assert held == ["cpu-packed-Q4_0", "cpu-packed-affine4g64", "cpu-packed-mxfp8", "cpu-packed-packed4-indexed", BF16]
    assert cpu.unpacked("cpu-packed-Q4_0") == "Q4_0"
    assert select_backend("cpu", "reference").packing("Q4_0") == "Q4_0"


@pytest.mark.usefixtures("no_native")
def test_without_native_kernels_rows_have_the_compute_dtype() -> None:
    found = select_backend("cpu", "auto")
    assert (found.name, found.row_dtype(BF16), found.packing("Q4_0")) == ("torch", BF16, "Q4_0")


@pytest.mark.usefixtures("with_triton", "with_native")
@pytest.mark.parametrize(
    ("device", "kernels", "name"),
    [
        ("cpu", "auto", "cpu"),
        ("cuda", "auto", "triton"),
        ("cuda", "triton", "triton"),
        ("cpu", "reference", "reference"),
        ("cuda", "reference", "reference"),
    ],
)
def test_one_backend_serves_a_device_and_a_choice_of_kernels(device: str, kernels: str, name: str) -> None:
    assert select_backend(device, kernels).name == name


@pytest.mark.usefixtures("no_triton", "with_native")
def test_without_triton_a_gpu_is_served_by_torch_or_not_at_all() -> None:
    assert select_backend("cuda", "auto").name == "torch"
    assert not select_backend("cuda", "auto").is_compact(plan_of("31B").layers[5])
    with pytest.raises(KernelError, match="no kernels 'triton' on cuda") as caught:
        select_backend("cuda", "triton")
    assert "triton: Triton is not installed" in caught.value.problems


def test_what_the_engine_asks_of_a_backend() -> None:
    layer = plan_of("31B").layers[5]
    assert layer.can_compact
    assert (TRITON.is_compact(layer), CPU.is_compact(layer)) == (True, False)
    assert not TRITON.is_compact(plan_of("E2B").layers[4])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_op_has_a_reference_that_comes_last_and_refuses_nothing(op: str, dtype: str, device: str) -> None:
    names = [impl.name for impl in IMPLEMENTATIONS if impl.op == op]
    assert names[-1] == "reference"
    assert len(set(names)) == len(names)
    assert select_kernel(KernelSite(op, None, device, dtype, F16, kernels="reference")).impl.name == "reference"


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, ids=lambda impl: f"{impl.op}-{impl.name}")
def test_every_provider_can_be_loaded(impl: KernelImpl) -> None:
    if impl.name == "triton":
        pytest.importorskip("triton")
    assert impl.op in (*OPS, *DRAFTER_OPS, *TOWER_OPS)
    assert callable(impl.load())


def test_no_provider_is_an_error_with_all_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        KernelImpl("linear", "first", "nowhere:f", lambda site: f"not on {site.device}"),
        KernelImpl("attention", "another op", "nowhere:f"),
        KernelImpl("linear", "second", "nowhere:f", lambda site: "not on Sundays"),
    )
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", table)
    with pytest.raises(KernelError, match="no kernel for linear on cuda") as caught:
        select_kernel(linear("cuda", F32, F32))
    assert caught.value.problems == ("first: not on cuda", "second: not on Sundays")
    assert select_kernel(KernelSite("attention", None, "cpu", F32, F32)).impl.name == "another op"


def test_the_first_that_accepts_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    table = (
        KernelImpl("linear", "first", "nowhere:f", lambda site: "no"),
        KernelImpl("linear", "second", "nowhere:f"),
        KernelImpl("linear", "third", "nowhere:f"),
    )
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", table)
    site = linear("cpu", F32, F32)
    assert select_kernel(site) == Selection(site, table[1], (("first", "no"),))


# ---- explaining ----


@pytest.mark.usefixtures("no_native", "with_triton")
@pytest.mark.parametrize("like", SIZES)
@pytest.mark.parametrize("kernels", registry.KERNELS)
def test_explain_covers_the_ops_of_a_plan(like: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    plan = plan_of(like)
    choices = list(explain(plan, "cpu", BF16, BF16, kernels))
    ops = [choice.site.op for choice in choices]
    without_ple = [op for op in OPS if op not in ("ple_embed", "ple_gate")]
    assert ops == (list(OPS) if like in ("E2B", "E4B") else without_ple)
    assert {(choice.site.device, choice.site.dtype, choice.site.stored) for choice in choices} == {("cpu", BF16, BF16)}
    if kernels != "auto":
        assert {choice.impl.name for choice in choices} == {kernels}
    else:
        assert {choice.impl.name for choice in choices if choice.site.op in ("linear", "attention")} <= {"torch", "torch-chunked"}


@pytest.mark.usefixtures("with_native")
def test_layers_whose_files_differ_are_told_apart() -> None:
    """A file of mixed bits is said of the layers concerned."""
    plan = plan_of("E2B")
    packed = {"layers.3.mlp.out": "mxfp8"}
    site = KernelSite("linear", None, "cpu", F32, BF16)
    kernels = registry.KernelPlan(plan, site, lambda name: (packed.get(name, "cpu-packed-Q4_0"),))
    found = [(each.site.op, each.impl.name, layers) for each, layers in kernels.selections()]
    assert ("mlp", "reference", (3,)) in found
    assert ("mlp", "native", tuple(index for index in range(len(plan.layers)) if index != 3)) in found
    for op in ("qkv", "attention"):
        assert [(name, each) for kind, name, each in found if kind == op] == [("native", tuple(range(len(plan.layers))))]
    linear = {(each.site.stored, each.impl.name) for each, _ in kernels.selections() if each.site.op == "linear"}
    assert linear == {("cpu-packed-Q4_0", "native"), ("mxfp8", "torch-chunked")}


@pytest.mark.usefixtures("with_triton", "no_native")
def test_layers_whose_geometry_differs_are_told_apart() -> None:
    """A head_dim that a kernel does not take is said of the layers concerned."""
    plan = plan_of("E2B")
    narrow = tuple(replace(layer, head_dim=48) if layer.window is None else layer for layer in plan.layers)
    kernels = registry.KernelPlan(replace(plan, layers=narrow), KernelSite("linear", None, "cuda", BF16, BF16), lambda _: (BF16,))
    found = [(each.site.op, each.impl.name, layers) for each, layers in kernels.selections()]
    assert ("attention", "triton", tuple(layer.index for layer in plan.layers if layer.window is not None)) in found
    assert ("attention", "torch", tuple(layer.index for layer in plan.layers if layer.window is None)) in found


def test_explaining_needs_no_torch() -> None:
    """Asking, unlike computing, must be possible from headers in milliseconds."""
    code = f"""
import json, sys
from pathlib import Path
from gemcutter import config
from gemcutter.ops.registry import explain
from gemcutter.plan import derive
plan = derive(config.read(json.loads(Path({str(Path(configs.__file__).parent / "demo" / "config.json")!r}).read_text())))
assert len(list(explain(plan, "cpu", "bfloat16", "bfloat16"))) == {len(OPS)}
sys.exit("torch" in sys.modules or "numpy" in sys.modules)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stderr) == (0, "")


# ---- the processor ----


@pytest.mark.parametrize(
    ("text", "features"),
    [
        (
            "processor\t: 0\nflags\t\t: fpu avx512_bf16 avx2\nbugs\t: x\n\nprocessor\t: 1\nflags\t\t: fpu\n",
            {"fpu", "avx512_bf16", "avx2"},
        ),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", {"fp", "asimd", "bf16"}),
        ("processor\t: 0\n", set()),
    ],
)
def test_features_are_read_from_the_system(text: str, features: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self: text)
    assert devices.cpu_features.__wrapped__() == features


def test_unknown_systems_have_no_features(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Path) -> str:
        raise FileNotFoundError(self)

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert devices.cpu_features.__wrapped__() == frozenset()
