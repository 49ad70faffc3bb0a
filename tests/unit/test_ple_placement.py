"""Where the per-layer-embedding table lives: refusals and defaults; its kernels are tested in tests/triton."""

from __future__ import annotations

import gc

import pytest
import torch

from gemcutter import api
from gemcutter.checkpoint.load.ple_placement import place_table
from gemcutter.errors import KernelError, RequestError
from gemcutter.load_options import PLE_PLACES, LoadOptions
from gemcutter.loading import open_model
from gemcutter.quant import Weight

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_table_stays_mapped_on_a_cpu_and_where_that_is_asked_for() -> None:
    table = Weight((torch.zeros(4, 8),))
    assert place_table(table, None, CPU) is table
    assert place_table(table, "mmap", GPU) is table
    assert place_table(table, "split", CPU) is table


def options(where: str | None, device: str) -> LoadOptions:
    return LoadOptions(model="demo", ple=where, device=device)


@pytest.mark.parametrize("where", PLE_PLACES)
def test_every_place_serves_a_gpu(where: str) -> None:
    assert options(where, "cuda").ple == where


def test_places_that_would_be_ignored_are_refused() -> None:
    assert options(None, "cpu").ple is None
    assert options("mmap", "cpu").ple == "mmap"
    assert options("split", "cpu").ple == "split"  # by tensor-parallel processes
    for where in ("gpu", "host"):
        with pytest.raises(KernelError, match="on a CPU the table stays mapped"):
            options(where, "cpu")
    with pytest.raises(KernelError, match="expected gpu, split, host or mmap, found 'disk'"):
        options("disk", "cuda")


@pytest.mark.parametrize(
    ("where", "device", "is_split"), [(None, "cpu", False), (None, "cuda", True), ("gpu", "cuda", False), ("split", "cpu", True)]
)
def test_several_gpus_share_the_table_unless_something_else_is_asked_for(where: str | None, device: str, is_split: bool) -> None:
    assert options(where, device).splits_ple == is_split


def test_one_process_has_nobody_to_share_with() -> None:
    with pytest.raises(RequestError, match="ple split: tensor-parallel processes share the table, and there is one"):
        open_model(options("split", "cpu"))


class Runtime:
    """CUDA's, as far as it pins."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.pinned: dict[int, int] = {}

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.pinned[address] = nbytes
        return self.error

    def cudaHostUnregister(self, address: int) -> int:
        del self.pinned[address]
        return 0


def test_a_pinned_table_takes_its_own_size_as_long_as_it_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, mapped = Runtime(), torch.arange(24.0).view(4, 6)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    table = place_table(Weight((mapped,)), "host", GPU)
    (part,) = table.parts
    assert isinstance(part, torch.Tensor)
    assert torch.equal(part, mapped)
    assert runtime.pinned == {part.data_ptr(): mapped.nbytes}
    assert part.data_ptr() != mapped.data_ptr()
    del part, table
    gc.collect()
    assert not runtime.pinned


def test_a_driver_that_pins_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Runtime(error=2))
    with pytest.raises(KernelError, match=r"can't pin 0.0 GB of memory \(error 2\)"):
        place_table(Weight((torch.zeros(4, 8),)), "host", GPU)


def test_load_refuses_before_it_reads() -> None:
    with pytest.raises(KernelError, match="ple host"):
        api.load("demo", ple="host")
