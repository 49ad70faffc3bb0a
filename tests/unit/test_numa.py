"""Memory nodes as Linux lists them, and memory that is spread over them, as the kernel itself tells."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import pytest
import torch

from gemcutter.numa import cpus_of, interleave, memory_nodes, read_list
from gemcutter.quant.hugepage_arena import allocate

MAPS = Path("/proc/self/numa_maps")


def policy_of(address: int) -> str:
    """Return how the kernel places the pages of the mapping that begins at an address."""
    lines = [line.split() for line in MAPS.read_text().splitlines()]
    return next(words[1] for words in lines if int(words[0], 16) == address)


@pytest.mark.parametrize(
    ("text", "numbers"), [("0\n", (0,)), ("0-1", (0, 1)), ("0,2-4,7\n", (0, 2, 3, 4, 7)), ("", ()), ("what", ()), ("1-x", ())]
)
def test_lists_of_numbers(tmp_path: Path, text: str, numbers: tuple[int, ...]) -> None:
    (tmp_path / "has_memory").write_text(text)
    assert read_list(tmp_path / "has_memory") == numbers
    assert memory_nodes(tmp_path) == numbers


def test_a_system_that_lists_no_nodes(tmp_path: Path) -> None:
    assert memory_nodes(tmp_path) == ()
    assert cpus_of(0, tmp_path) == ()


def test_processors_beside_a_node(tmp_path: Path) -> None:
    (tmp_path / "node1").mkdir()
    (tmp_path / "node1" / "cpulist").write_text("4-7,12\n")
    assert cpus_of(1, tmp_path) == (4, 5, 6, 7, 12)


@pytest.mark.skipif(not MAPS.exists() or platform.machine() not in ("x86_64", "aarch64"), reason="no such policies")
def test_the_kernel_interleaves_what_it_was_asked_to() -> None:
    memory = mmap.mmap(-1, 16 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
    assert interleave(address, 16 << 20, memory_nodes()[:1])
    memory[0] = 1
    assert policy_of(address) == f"interleave:{memory_nodes()[0]}"


def test_one_node_needs_nothing_and_nonsense_is_refused() -> None:
    if len(memory_nodes()) < 2:
        assert not interleave(0, 4096)
    assert not interleave(0, 4096, (5000,))  # no such node


def test_slabs_are_written_to_whatever_the_nodes() -> None:
    taken = allocate((3, 5 << 20))
    taken.fill_(7)
    assert int(taken.float().sum()) == 7 * 15 << 20
