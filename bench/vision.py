"""Time of an image through a vision tower of E2B's geometry, beside transformers' own in the same rounds.

Prints medians, ratios and the share of the products' own rate on this machine: a tower can't be faster than its products and
attention would be at the rate of one large product of the same kind, rows in the cache.

    python bench/vision.py                  # 768 x 768 pixels, bfloat16, all 16 layers
    python bench/vision.py --layers 4 -r 3  # a shorter look
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from transformers.models.gemma4 import Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4VisionModel

from gemcutter import native
from gemcutter.media.image import ImagePatches, PatchShape, cut_image
from gemcutter.model.vision import VisionTower
from gemcutter.ops.cpu.bindings import array_of, entry
from gemcutter.ops.types import Param
from gemcutter.plan import ParamKind
from gemcutter.quant import Weight
from gemcutter.tower_plan import VisionPlan

HIDDEN, HEADS, HEAD_DIM, WIDTH, OUT = 768, 12, 64, 3072, 1536  # E2B's
ROUNDS = 5


def draw_params(plan: VisionPlan) -> dict[str, Param]:
    """Draw a tower's parameters, bounds wide."""
    draw, found = torch.Generator().manual_seed(0), dict[str, Param]()
    for spec in plan.params():
        if spec.kind is ParamKind.MATRIX:
            rows = [rows for _, rows in spec.parts] or [spec.shape[0]]
            parts = tuple(
                (torch.randn(each, *spec.shape[1:], generator=draw) * spec.shape[-1] ** -0.5).bfloat16() for each in rows
            )
            found[spec.name] = Weight(parts, tuple(name for name, _ in spec.parts))
        elif spec.kind is ParamKind.SCALAR:
            found[spec.name] = torch.tensor(-30.0 if spec.name.endswith("min") else 30.0)
        else:
            found[spec.name] = torch.ones(spec.shape)
    return found


def multiply_adds(patches: int, layers: int) -> float:
    """Count the multiply-adds of products and attention."""
    products = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * WIDTH
    return layers * (patches * products + 2 * patches**2 * HIDDEN)


def product_rate() -> float:
    """Measure multiply-adds a second of one large product of bfloat16 rows, the best of some."""
    rows, weight = torch.randn(512, HIDDEN), (torch.randn(WIDTH, HIDDEN) * HIDDEN**-0.5).bfloat16()
    out, parts, call = torch.empty(512, WIDTH), array_of([weight]), entry("gc_linear")
    best = min(timed(lambda: call(ctypes.addressof(parts), 1, rows.data_ptr(), 512, 1, out.data_ptr())) for _ in range(20))
    return 512 * HIDDEN * WIDTH / best


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def transformers_tower(layers: int, dtype: torch.dtype, image: ImagePatches) -> Callable[[], object]:
    config = Gemma4VisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=WIDTH,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        head_dim=HEAD_DIM,
        use_clipped_linears=True,
    )
    config._attn_implementation = "sdpa"
    model, values, positions = Gemma4VisionModel(config).eval().to(dtype), image.values()[None].to(dtype), image.positions()[None]

    def call() -> object:
        with torch.inference_mode():
            return model(pixel_values=values, pixel_position_ids=positions)

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--pixels", type=int, default=768, help="side of the square image")
    parser.add_argument("-r", "--rounds", type=int, default=ROUNDS)
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    plan = VisionPlan(
        num_layers=given.layers,
        hidden=HIDDEN,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HEAD_DIM,
        mlp_width=WIDTH,
        patch=16,
        pool=3,
        positions=10240,
        soft_tokens=280,
        theta=100.0,
        eps=1e-6,
        clipped=True,
        standardized=False,
        out=OUT,
    )
    pixels = np.random.default_rng(0).integers(0, 256, (given.pixels, given.pixels, 3), dtype=np.uint8)
    image = cut_image(pixels, 280, PatchShape())
    tower = VisionTower(plan, draw_params(plan), torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "gemcutter bfloat16": lambda: tower.encode([image]),
        "transformers bfloat16": transformers_tower(given.layers, torch.bfloat16, image),
        "transformers float32": transformers_tower(given.layers, torch.float32, image),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_number in range(given.rounds + 1):
        for name, call in calls.items():
            seconds = timed(call)
            if round_number:  # the first warms up
                times[name].append(seconds)
    work, rate = multiply_adds(image.rows * image.columns, given.layers), product_rate()
    print(
        f"{image.rows} x {image.columns} patches, {given.layers} layers, {work / 1e9:.0f} G multiply-adds, level {native.level()}"
    )
    own = statistics.median(times["gemcutter bfloat16"])
    for name, found in times.items():
        middle = statistics.median(found)
        spread = f"{min(found):.2f} to {max(found):.2f}"
        print(f"{name:24} {middle:6.2f} s ({spread})  {middle / own:4.2f}x  {work / middle / 1e9:4.0f} G/s")
    print(f"one product of bfloat16 rows: {rate / 1e9:.0f} G/s; the tower reaches {work / own / rate:.0%} of that")


if __name__ == "__main__":
    main()
