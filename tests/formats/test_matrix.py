"""The matrix of formats, sizes and states is as declared, and the README says so.

Every file is made in `matrix.py`. What loads must give the logits of its values stored plainly, with exactly the surplus tensors
passed over that were put in; what is refused must say why.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf as gguf_library
import pytest
import torch
from torch import Tensor

from gemcutter.checkpoint.formats import FORMATS
from gemcutter.checkpoint.load.load_params import load_params
from gemcutter.checkpoint.load.match import Checkpoint, open_checkpoint
from gemcutter.checkpoint.write.synth import SIZES
from gemcutter.errors import CheckpointError
from gemcutter.model.text import Decoder
from gemcutter.plan import Proj
from tests.formats.matrix import BEGIN, END, LAYOUTS, OWN_VALUES, STATES, Layout, State, model, put_into, table
from tests.topologies import TOLERANCE, relative_error, run_alone

README = Path(__file__).parents[2] / "README.md"
IDS = (5, 40, 3, 17, 40, 9, 22)
MATRICES = ("attn.in", "mlp.in", "mlp.out", "moe.in", "moe.out")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Limit torch to one thread: these models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def logits(checkpoint: Checkpoint) -> Tensor:
    params = load_params(checkpoint, torch.float32, torch.device("cpu"))
    return run_alone(Decoder(checkpoint.plan, params, torch.float32, "cpu", "reference"), IDS, chunk=len(IDS)).logits


def check_headers(checkpoint: Checkpoint, layout: Layout, like: str, state: State) -> None:
    """Insist that matrices are stored as declared, and that what was put in beside the decoder, and no more, was passed over."""
    pieces = [piece for name, found in checkpoint.matched.pieces.items() if name.endswith(MATRICES) for piece in found]
    assert {piece.data.dtype for piece in pieces} == {layout.stored}, state
    redundant = {piece.label for piece in checkpoint.matched.redundant}
    assert redundant == (layout.redundant(like) if state.has_unread else set()), state
    assert ("vision tower" in checkpoint.matched.other_modules) is state.is_wrapped, state
    assert checkpoint.format == layout.format, state


@pytest.mark.parametrize("like", SIZES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_cell_is_as_declared(layout: Layout, like: str, tmp_path: Path) -> None:
    wanted: Tensor | None = None
    for state in STATES:
        packed, dense = layout.files(tmp_path / str(state), like, state)
        if layout.refusal is not None:
            with pytest.raises(CheckpointError) as caught:
                open_checkpoint(packed)
            assert layout.refusal.error in str(caught.value), state
            continue
        if wanted is None:
            wanted = logits(open_checkpoint(dense))
        checkpoint = open_checkpoint(packed)
        check_headers(checkpoint, layout, like, state)
        assert relative_error(logits(checkpoint), wanted) < TOLERANCE, state


def test_sizes_have_something_to_leave_unread() -> None:
    """All but the values of layers that take their keys is about layers that read another's."""
    kinds = {like: {layer.proj for layer in model(like).plan.layers} for like in SIZES}
    assert all(kinds[like] == {Proj.QKV, Proj.Q_ONLY} for like in ("E2B", "E4B"))
    assert all(kinds[like] == {Proj.QKV, Proj.QK_ONLY} for like in ("12B", "26B-A4B", "31B"))
    assert {like: len(model(like).unread) for like in SIZES} == {"E2B": 6, "E4B": 6, "12B": 1, "26B-A4B": 1, "31B": 1}


def test_values_of_their_own_are_used(tmp_path: Path) -> None:
    """As the README notes of GGUF: what the file stores for the values is not passed over, even where it copies the keys'."""
    (layout,) = [layout for layout in LAYOUTS if str(layout) == "GGUF Q8_0"]
    assert OWN_VALUES in layout.notes("31B")
    assert OWN_VALUES not in layout.notes("E2B")
    kinds = {}
    for state in STATES:
        packed, _ = layout.files(tmp_path / str(state), "31B", state)
        kinds[state.has_unread] = {layer.proj for layer in open_checkpoint(packed).plan.layers}
    assert kinds == {False: {Proj.QKV, Proj.QK_ONLY}, True: {Proj.QKV}}


def test_projectors_are_no_text_models(tmp_path: Path) -> None:
    """As the README notes of llama.cpp's file for a tower."""
    writer = gguf_library.GGUFWriter(tmp_path / "mmproj.gguf", "clip")
    writer.add_tensor("v.blk.0.attn_k.weight", torch.ones(8, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="projector"):
        open_checkpoint(tmp_path / "mmproj.gguf")


def test_every_format_has_a_row() -> None:
    assert {layout.format for layout in LAYOUTS} == {format.NAME for format in FORMATS}
    assert len({str(layout) for layout in LAYOUTS}) == len(LAYOUTS)


def test_readme_holds_the_table() -> None:
    text = README.read_text()
    assert put_into(text) == text, "run python -m tests.formats.matrix --write README.md"


def test_table_says_what_is_refused_and_why() -> None:
    lines = table().splitlines()
    for layout in LAYOUTS:
        (row,) = [line for line in lines if line.startswith(f"| {layout.title} | {layout.scheme} |")]
        assert row.count("| no ") == (len(SIZES) if layout.refusal else 0)
        assert all(any(note.text in line for line in lines) for like in SIZES for note in layout.notes(like))


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}{BEGIN}", f"{BEGIN}{BEGIN}{END}", f"{BEGIN}{END}{END}"])
def test_table_needs_its_place(text: str) -> None:
    with pytest.raises(ValueError, match="each once"):
        put_into(text)


def test_table_replaces_what_is_between_the_markers_alone() -> None:
    assert put_into(f"before {BEGIN} old {END} after") == f"before {BEGIN}\n{table()}\n{END} after"
