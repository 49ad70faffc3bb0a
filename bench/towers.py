"""Time of an image or a sound through a tower of E2B's geometry, beside transformers' own in the same rounds.

Prints medians, ratios and the share of the products' own rate on this machine: a tower can't be faster than its products and
attention would be at the rate of one large product of the same kind, rows in the cache. The time that processors spent stands
beside the clock's: it says what was computed on a machine that others use, too.

    python bench/towers.py image                              # 768 x 768 pixels, all 16 layers
    python bench/towers.py sound --layers 4 -r 3              # 30 s of sound, a shorter look
    python bench/towers.py images --count 8 --soft-tokens 70  # several images together, and one by one
"""

from __future__ import annotations

import argparse
import ctypes
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers.models.gemma4 import Gemma4AudioConfig, Gemma4VisionConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4AudioModel, Gemma4VisionModel

from gemcutter import native
from gemcutter.media.audio import SoundFrames, SoundShape, cut_sound
from gemcutter.media.decode_sound import RATE
from gemcutter.media.image import ImagePatches, PatchShape, cut_image
from gemcutter.model.audio import AudioTower
from gemcutter.model.vision import VisionTower
from gemcutter.ops.cpu.bindings import array_of, entry
from gemcutter.ops.types import Param
from gemcutter.param_spec import ParamKind, ParamSpec
from gemcutter.quant import Weight
from gemcutter.tower_config import AudioConfig, VisionConfig
from gemcutter.tower_plan import AudioPlan, VisionPlan, plan_audio, plan_vision

OUT = 1536  # E2B's hidden size; the towers' own sizes are the configs' defaults
Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """What is timed: the calls by name, the first of them ours, and the multiply-adds of one call."""

    title: str
    calls: dict[str, Call]
    work: float


def draw_params(specs: Iterable[ParamSpec]) -> dict[str, Param]:
    """Draw a tower's parameters: matrices in bfloat16, bounds wide."""
    draw, found = torch.Generator().manual_seed(0), dict[str, Param]()
    for spec in specs:
        if spec.kind is ParamKind.MATRIX:
            rows = [rows for _, rows in spec.parts] or [spec.shape[0]]
            parts = tuple(
                (torch.randn(each, *spec.shape[1:], generator=draw) * spec.shape[-1] ** -0.5).bfloat16() for each in rows
            )
            found[spec.name] = Weight(parts, tuple(name for name, _ in spec.parts))
        elif spec.kind is ParamKind.SCALAR:
            found[spec.name] = torch.tensor(-30.0 if spec.name.endswith("min") else 30.0)
        elif spec.kind is ParamKind.CONV:
            found[spec.name] = torch.randn(spec.shape, generator=draw) * math.prod(spec.shape[1:]) ** -0.5
        else:
            found[spec.name] = torch.ones(spec.shape)
    return found


# ---- what is timed ----


def image_case(given: argparse.Namespace) -> Case:
    plan, tower = vision_tower(given.layers)
    image = draw_image(given.pixels, 280, 0)
    calls: dict[str, Call] = {"gemcutter bfloat16": lambda: tower.encode([image])}
    for dtype in (torch.bfloat16, torch.float32):
        calls[f"transformers {str(dtype)[6:]}"] = official_vision(plan, dtype, image)
    return Case(f"{image.rows} x {image.columns} patches, {plan.num_layers} layers", calls, vision_work(plan, image))


def images_case(given: argparse.Namespace) -> Case:
    plan, tower = vision_tower(given.layers)
    images = [draw_image(given.pixels, given.soft_tokens, seed) for seed in range(given.count)]
    calls: dict[str, Call] = {
        "together": lambda: tower.encode(images),
        "one by one": lambda: [tower.encode([image]) for image in images],
    }
    title = f"{given.count} images of {images[0].rows} x {images[0].columns} patches, {plan.num_layers} layers, bfloat16"
    return Case(title, calls, sum(vision_work(plan, image) for image in images))


def sound_case(given: argparse.Namespace) -> Case:
    plan = plan_audio(AudioConfig(num_hidden_layers=given.layers or AudioConfig.num_hidden_layers), OUT)
    assert isinstance(plan, AudioPlan)
    samples = np.random.default_rng(0).normal(0, 0.1, int(given.seconds * RATE)).astype(np.float32)
    sound = cut_sound((samples, RATE), SoundShape())
    params = draw_params(plan.params())
    calls = dict[str, Call]()
    for dtype in (torch.bfloat16, torch.float32):
        tower = AudioTower(plan, params, dtype)
        calls[f"gemcutter {str(dtype)[6:]}"] = lambda tower=tower: tower.encode([sound])  # type: ignore[misc]
    for dtype in (torch.bfloat16, torch.float32):
        calls[f"transformers {str(dtype)[6:]}"] = official_audio(plan, dtype, sound)
    return Case(f"{given.seconds:g} s of sound, {plan.num_layers} layers", calls, audio_work(plan, sound))


def vision_tower(layers: int | None) -> tuple[VisionPlan, VisionTower]:
    config = VisionConfig(num_hidden_layers=layers or VisionConfig.num_hidden_layers, use_clipped_linears=True)
    plan = plan_vision(config, OUT)
    assert isinstance(plan, VisionPlan)
    return plan, VisionTower(plan, draw_params(plan.params()), torch.bfloat16)


def draw_image(pixels: int, soft_tokens: int, seed: int) -> ImagePatches:
    drawn = np.random.default_rng(seed).integers(0, 256, (pixels, pixels, 3), dtype=np.uint8)
    return cut_image(drawn, soft_tokens, PatchShape())


def official_vision(plan: VisionPlan, dtype: torch.dtype, image: ImagePatches) -> Call:
    config = Gemma4VisionConfig(num_hidden_layers=plan.num_layers, use_clipped_linears=True)
    config._attn_implementation = "sdpa"
    model, values, positions = Gemma4VisionModel(config).eval().to(dtype), image.values()[None].to(dtype), image.positions()[None]
    return torch.inference_mode()(lambda: model(pixel_values=values, pixel_position_ids=positions))


def official_audio(plan: AudioPlan, dtype: torch.dtype, sound: SoundFrames) -> Call:
    model = Gemma4AudioModel(Gemma4AudioConfig(num_hidden_layers=plan.num_layers)).eval().to(dtype)
    values = sound.values_FC[None].to(dtype)
    mask = torch.ones(values.shape[:2], dtype=torch.bool)
    return torch.inference_mode()(lambda: model(input_features=values, attention_mask=mask))


# ---- operations ----


def vision_work(plan: VisionPlan, image: ImagePatches) -> float:
    """Count the multiply-adds of the layers' products and attention."""
    patches, hidden = image.rows * image.columns, plan.hidden
    products = 4 * hidden * hidden + 3 * hidden * plan.mlp_width
    return plan.num_layers * (patches * products + 2 * patches**2 * hidden)


def audio_work(plan: AudioPlan, sound: SoundFrames) -> float:
    """Count the multiply-adds of convolutions, products and attention."""
    frames, hidden, (first, second) = len(sound.values_FC), plan.hidden, plan.conv_channels
    outlines = frames * plan.conv_values // second  # positions of the first convolution's channels, in time and frequency
    convolutions = outlines * 9 * first + outlines / 4 * 9 * first * second
    products = 4 * hidden * plan.ff_width + 7 * hidden * hidden
    attention = hidden * (2 * plan.context + plan.relative_positions)
    around = hidden * (plan.conv_values + plan.width) + plan.width * plan.out
    return convolutions + sound.soft_tokens * (plan.num_layers * (products + attention) + around)


def product_rate() -> float:
    """Measure multiply-adds a second of one large product of bfloat16 rows, the best of some."""
    rows, weight = torch.randn(512, 768), (torch.randn(3072, 768) * 768**-0.5).bfloat16()
    out, parts, call = torch.empty(512, 3072), array_of([weight]), entry("gc_linear")
    best = min(timed(lambda: call(ctypes.addressof(parts), 1, rows.data_ptr(), 512, 1, out.data_ptr()))[0] for _ in range(20))
    return out.numel() * 768 / best


# ---- times ----


def timed(call: Call) -> tuple[float, float]:
    """Return the seconds of a call, and those that processors spent on it."""
    start, spent = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - start, time.process_time() - spent


def report(case: Case, times: dict[str, list[tuple[float, float]]]) -> None:
    print(f"{case.title}, {case.work / 1e9:.0f} G multiply-adds, level {native.level()}")
    middles = {name: [statistics.median(each) for each in zip(*found, strict=True)] for name, found in times.items()}
    own, own_spent = next(iter(middles.values()))
    for name, (middle, spent) in middles.items():
        spread = f"{min(times[name])[0]:.2f} to {max(times[name])[0]:.2f}"
        ratio, rate = f"{middle / own:5.2f}x", f"{case.work / middle / 1e9:4.0f} G/s"
        print(f"{name:22} {middle:6.2f} s ({spread}) {ratio} {rate}, processors {spent:6.2f} s {spent / own_spent:5.2f}x")
    rate = product_rate()
    print(f"one product of bfloat16 rows: {rate / 1e9:.0f} G/s; the first line reaches {case.work / own / rate:.0%} of that")


CASES: dict[str, Callable[[argparse.Namespace], Case]] = {"image": image_case, "images": images_case, "sound": sound_case}


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--layers", type=int, help="fewer than the tower has")
    parser.add_argument("--pixels", type=int, default=768, help="side of a square image")
    parser.add_argument("--count", type=int, default=8, help="of images together")
    parser.add_argument("--soft-tokens", type=int, default=70, help="budget of each of them")
    parser.add_argument("--seconds", type=float, default=30, help="of sound")
    parser.add_argument(
        "--without", nargs="*", default=[], metavar="NAME", help='lines to leave out, such as "transformers bfloat16"'
    )
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args(arguments)


def main() -> None:
    given = read_options()
    torch.set_num_threads(given.threads)
    case = CASES[given.case](given)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in case.calls if name not in given.without}
    for round_number in range(given.rounds + 1):
        for name, found in times.items():
            seconds = timed(case.calls[name])
            if round_number:  # the first warms up
                found.append(seconds)
    report(case, times)


if __name__ == "__main__":
    main()
