"""Runs a tiny model for some minutes as its hardest users would, and watches what must not grow.

Several threads submit requests of all kinds (greedy, sampled, stop strings, log-probabilities, conversations, prefixes that come
again), cancel some, drop streams in reference cycles, and meet interrupts; an adapter comes and goes. Every greedy reply that
ends by itself must be its prompt's. At the end of each round nothing runs: pages, open files and threads must be back at what
they were, and memory may not have grown since the first rounds.

    python tools/soak.py --minutes 30
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from held import held
from safetensors.torch import save_file

import gemcutter
from gemcutter import GemcutterError, Model, RequestError
from tests.formats.mutations import write_sound

THREADS, ROUND_S = 4, 10.0
GROWTH_BYTES = 24 << 20  # of resident memory, from the third round to the last: allocators keep some
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 1.2, "top_k": 20, "seed": 5, "logprobs": 2},
    {"repetition_penalty": 1.3, "presence_penalty": 0.2},
    {"stop": ["e", "zz"]},
    {"prompt_logprobs": 1},
    {"top_logits": 4, "hidden_states": True},
    {"logit_bias": {5: 3.0}, "suppress": (6, 7)},
    {"adapter": "one"},
)


def write_adapter(folder: Path) -> Path:
    """Write a LoRA adapter that changes the queries of every layer."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    held = {}
    for layer in range(4):
        stem = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        held[f"{stem}.lora_A.weight"] = torch.randn(4, 64, generator=generator) * 0.1
        held[f"{stem}.lora_B.weight"] = torch.randn(64, 4, generator=generator) * 0.1
    save_file(held, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


class Soak:
    """One model, and what its users have seen."""

    def __init__(self, model: Model, seed: int) -> None:
        self.model, self.seed = model, seed
        self.seen: Counter[str] = Counter()
        draw = random.Random(seed)
        self.prompts = [[2, *(draw.randrange(8, 4000) for _ in range(size))] for size in (1, 3, 9, 20, 41, 70, 130)]
        self.solo = [model.generate([prompt], max_tokens=12, ignore_eos=True)[0].tokens for prompt in self.prompts]
        self.is_over = threading.Event()

    def use(self, number: int) -> None:
        """Be one user for a round."""
        draw = random.Random(f"{self.seed}-{number}")
        while not self.is_over.is_set():
            index, options = draw.randrange(len(self.prompts)), draw.choice(OPTIONS)
            try:
                self._ask(draw, index, options)
            except RequestError as error:
                self.seen["refused" if "not loaded" in str(error) or "adapter" in str(error) else f"UNEXPECTED {error}"] += 1
            except Exception as error:
                self.seen[f"UNEXPECTED {type(error).__name__}: {error}"] += 1

    def _ask(self, draw: random.Random, index: int, options: dict[str, Any]) -> None:
        prompt, fate = self.prompts[index], draw.random()
        if fate < 0.1:
            talk = [{"role": "user", "content": "Hi" * draw.randrange(1, 9)}]
            self.model.chat(talk, max_tokens=draw.randrange(1, 9))
            self.seen["conversations"] += 1
            return
        stream = self.model.stream(prompt, max_tokens=12, ignore_eos=True, **options)
        if fate < 0.25:
            for _ in range(draw.randrange(4)):
                next(stream, None)
            stream.close()
            self.seen["closed"] += 1
        elif fate < 0.4:
            next(stream, None)
            cycle: list[Any] = [stream]
            cycle.append(cycle)  # which the collector alone can free
            self.seen["dropped"] += 1
        else:
            found = stream.finish()
            is_greedy = not options or options.keys() <= {"prompt_logprobs", "top_logits", "hidden_states"}
            if is_greedy and found.tokens != self.solo[index]:
                self.seen[f"UNEXPECTED reply {found.tokens} to prompt {index}"] += 1
            self.seen["finished"] += 1

    def round(self, number: int, adapter: Path, seconds: float) -> None:
        """Let users and interrupts loose for a while, then wait until nothing runs."""
        self.is_over.clear()
        users = [threading.Thread(target=self.use, args=(number * THREADS + index,)) for index in range(THREADS)]
        for user in users:
            user.start()
        draw, end = random.Random(f"{self.seed}-main-{number}"), time.monotonic() + seconds
        while time.monotonic() < end:
            self._change_adapter(draw, adapter)
            self._be_interrupted(draw)
            if draw.random() < 0.2:
                gc.collect()
        self.is_over.set()
        for user in users:
            user.join()
        if "one" in self.model.adapters:
            self._unload()
        while self.model.loop.run(lambda engine: engine.has_work):
            gc.collect()
            time.sleep(0.01)

    def _change_adapter(self, draw: random.Random, adapter: Path) -> None:
        if "one" not in self.model.adapters:
            self.model.load_adapter("one", adapter)
            self.seen["adapters loaded"] += 1
        elif draw.random() < 0.3:
            self._unload(tries=1)

    def _unload(self, tries: int = 1000) -> None:
        for _ in range(tries):
            try:
                self.model.unload_adapter("one")
                return
            except RequestError:  # somebody uses it
                gc.collect()
                time.sleep(0.01)

    def _be_interrupted(self, draw: random.Random) -> None:
        """Read a stream and be interrupted at any moment."""
        try:
            signal.setitimer(signal.ITIMER_REAL, 1e-4 + draw.random() * 0.03)
            self.model.stream(draw.choice(self.prompts), max_tokens=12, ignore_eos=True).finish()
        except KeyboardInterrupt:
            self.seen["interrupted"] += 1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)


def main() -> int:
    """Run rounds until the time is over; print what was held after each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, interrupt)
    with tempfile.TemporaryDirectory() as name:
        folder = write_sound("hf", Path(name) / "model")
        adapter = write_adapter(Path(name) / "adapter")
        model = gemcutter.load(
            str(folder), dtype="float32", kernels="reference", context=192, max_num_seqs=4, max_batched_tokens=48
        )
        soak, rounds = Soak(model, options.seed), list[dict[str, int]]()
        end = time.monotonic() + options.minutes * 60
        while time.monotonic() < end or len(rounds) < 4:
            soak.round(len(rounds), adapter, min(ROUND_S, options.minutes * 60 / 5))
            rounds.append(held(model))
            if len(rounds) <= 4 or len(rounds) % 10 == 0:
                print(f"round {len(rounds)}: {rounds[-1]}; {dict(soak.seen)}", flush=True)
        model.close()
    return _judge(rounds, soak.seen)


def _judge(rounds: list[dict[str, int]], seen: Counter[str]) -> int:
    first, last = rounds[min(2, len(rounds) - 1)], rounds[-1]
    problems = [f"{what}: {count}" for what, count in seen.items() if what.startswith("UNEXPECTED")]
    problems += [
        f"{name}: {first[name]} after round 3, {last[name]} at the end"
        for name in ("files", "threads")
        if last[name] > first[name]
    ]
    if last["pages"]:
        problems.append(f"{last['pages']} pages are held by nobody")
    if last["bytes"] - first["bytes"] > GROWTH_BYTES:
        problems.append(f"memory grew from {first['bytes']:,} to {last['bytes']:,} bytes")
    print(f"{len(rounds)} rounds, {seen.total():,} requests and events; held at the end: {last}")
    for problem in problems[:20]:
        print(f"  {problem}")
    return int(bool(problems))


if __name__ == "__main__":
    try:
        raise SystemExit(main())
    except GemcutterError as error:
        raise SystemExit(f"error: {error}") from error
