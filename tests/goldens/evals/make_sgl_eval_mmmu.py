"""Write what sgl-eval 0.1.3 asks of made-up MMMU-Pro rows to sgl_eval_mmmu.json.

Run it in an environment with sgl-eval alone: python tests/goldens/evals/make_sgl_eval_mmmu.py
"""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

from PIL import Image
from sgl_eval._vendored.nemo_skills.dataset._utils import get_mcq_fields
from sgl_eval.evals import _mmmu_pro, _vision
from sgl_eval.evals._prompts import render_prompt, resolve_prompt

HERE = Path(__file__).parent


def parts_of(content: str | list[dict[str, Any]], sizes: list[int]) -> list[Any]:
    """Return texts as they are, and for an image the number of its column, which its width is."""
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    left = iter(sizes)
    return [block["text"] if block["type"] == "text" else next(left) for block in blocks]


def standard(row: dict[str, Any]) -> list[Any]:
    """Return the parts of a question of the standard part."""
    images = {f"image_{n}": Image.new("RGB", (n, 1)) for n in row["images"]}
    example = _mmmu_pro._build_example(row | images, 0)
    sizes = [image.width for image in _mmmu_pro._images_for_question(row | images, row["question"])]
    prompt = render_prompt(resolve_prompt("mmmu-pro-cot"), problem=example.inputs["problem"])
    return parts_of(_vision.build_user_content(prompt, example.media), sizes)


def vision(row: dict[str, Any]) -> str:
    """Return the text beside the picture of a question."""
    problem = get_mcq_fields("", _mmmu_pro._parse_options(row))["problem"]
    return render_prompt(resolve_prompt("mmmu-pro"), problem=problem)


if __name__ == "__main__":
    rows = json.loads((HERE / "mmmu_rows.json").read_text())["mmmu_pro"]
    found = {
        "made_by": f"sgl-eval {importlib.metadata.version('sgl-eval')}",
        "standard": {row["id"]: standard(row) for row in rows},
        "vision": {row["id"]: vision(row) for row in rows},
    }
    (HERE / "sgl_eval_mmmu.json").write_text(json.dumps(found, indent=1) + "\n")
