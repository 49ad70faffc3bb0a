"""llama.cpp reads the GGUF files that `convert` writes, and continues prompts as this engine does.

Skips without llama-cpp-python; `make check-peers` installs it, which takes minutes. Stock llama.cpp takes the layers just before
the shared ones as the sources of keys and values, which does not fit the demo, so tiny-a stands here. Read `test_convert.py` for
what the files hold.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import gemcutter
from gemcutter.checkpoint.convert.convert import convert

llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: make check-peers")

GOLDENS = Path(__file__).parents[1] / "goldens"
PROMPTS = [tuple(each["token_ids"]) for each in json.loads((GOLDENS / "prompts.json").read_text())["prompts"]]
TOKENS = 24


@pytest.mark.parametrize(("quant", "agreeing"), [("f16", 12), ("Q8_0", 11), ("Q4_0", 10)])
def test_llama_cpp_continues_alike(quant: str, agreeing: int, tmp_path: Path) -> None:
    """llama.cpp rounds activations, to 8 bits before quantized weights, so that texts may part where two tokens nearly tie."""
    path = tmp_path / f"tiny-a-{quant}.gguf"
    convert(GOLDENS / "tiny-a", path, "gguf", quant)
    model = gemcutter.load(str(path), dtype="float32")
    ours = [reply.tokens for reply in model.generate(PROMPTS, max_tokens=TOKENS, ignore_eos=True, temperature=0.0, suppress=())]
    peer = llama_cpp.Llama(str(path), n_ctx=512, n_threads=1, verbose=False)
    theirs = []
    for prompt in PROMPTS:
        peer.reset()
        stream = peer.generate(list(prompt), temp=0.0, repeat_penalty=1.0)
        theirs.append(tuple(token for token, _ in zip(stream, range(TOKENS), strict=False)))
    assert [reply[0] for reply in ours] == [reply[0] for reply in theirs]
    assert sum(mine == other for mine, other in zip(ours, theirs, strict=True)) >= agreeing
