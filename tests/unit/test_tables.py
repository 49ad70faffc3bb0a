"""Where the per-layer-embedding table lives: refusals and defaults; its kernels are tested in tests/triton."""

from __future__ import annotations

import pytest
import torch

from gemcutter import api
from gemcutter.checkpoint.tables import PLACES, check_place, place_table
from gemcutter.errors import KernelError
from gemcutter.quant import Weight

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_a_table_stays_mapped_on_a_cpu_and_where_that_is_asked_for() -> None:
    table = Weight((torch.zeros(4, 8),))
    assert place_table(table, None, CPU) is table
    assert place_table(table, "mmap", GPU) is table


@pytest.mark.parametrize("where", PLACES)
def test_every_place_serves_a_gpu(where: str) -> None:
    check_place(where, GPU)


def test_places_that_would_be_ignored_are_refused() -> None:
    check_place(None, CPU)
    check_place("mmap", CPU)
    for where in ("gpu", "host"):
        with pytest.raises(KernelError, match="on a CPU the table stays mapped"):
            check_place(where, CPU)
    with pytest.raises(KernelError, match="expected one of gpu, host, mmap, found 'disk'"):
        check_place("disk", GPU)


def test_load_refuses_before_it_reads() -> None:
    with pytest.raises(KernelError, match="ple host"):
        api.load("demo", ple="host")
