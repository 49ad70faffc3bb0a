"""lm-eval's view of a model: its requests become ours, in the same process.

Owns the translation alone: which options of lm-eval mean what here. Scores come from `scoring.py`, texts from the engine. Needs
lm-eval (the extra `lm-eval`), and is imported by it under the name that `cli/lm_eval.py` registers. BOS stands before every raw
text exactly once, and never before a text that begins with it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from tqdm import tqdm

from gemcutter.api import Model, load_model
from gemcutter.errors import RequestError
from gemcutter.load_options import LoadOptions
from gemcutter.scoring import Pair, score_pairs

log = logging.getLogger(__name__)

NAME = "gemcutter"
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is there counts
MAX_GEN_TOKS = 256  # lm-eval's own default
PLACEHOLDER, IMAGE = "<image>", "<|image|>"  # of an image: in lm-eval's prompts, and in the model's
IGNORED = {"do_sample", "until", "temperature"}
ALIASES = {"pretrained": "model", "max_length": "context"}  # what lm-eval's other models call an argument


def options_of(arguments: Mapping[str, Any]) -> LoadOptions:
    """Return load options from `--model_args` and what the command line adds. Raises RequestError that lists all there are."""
    found = {ALIASES.get(name, name): value for name, value in arguments.items()}
    known = {each.name for each in fields(LoadOptions)}
    if unknown := sorted(set(found) - known):
        raise RequestError(
            f"--model_args {', '.join(unknown)}: not known; arguments are: {', '.join(sorted(known | set(ALIASES)))}"
        )
    if "model" not in found:
        raise RequestError("--model_args: which model? Say --model_args model=FOLDER")
    if isinstance(found.get("media"), str):
        found["media"] = tuple(found["media"].split("+"))
    return LoadOptions(**found)


class GemcutterLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped
    """A model for lm-eval. Arguments are those of `gemcutter.LoadOptions`; `enable_thinking` lets replies begin with a thought.

    `batch_size` is how many sequences run at a time ("auto" is the default); `max_gen_toks` bounds replies where a task does not.
    """

    MULTIMODAL = True

    def __init__(
        self,
        *,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        enable_thinking: bool = False,
        **arguments: Any,
    ) -> None:
        """Load the model. Raises GemcutterError."""
        super().__init__()
        if device is not None and (torch.cuda.is_available() or not device.startswith("cuda")):
            arguments["device"] = device  # lm-eval says cuda:0 where nobody says anything
        if batch_size is not None and not str(batch_size).startswith("auto"):
            arguments["max_num_seqs"] = int(batch_size)
        self.model: Model = load_model(options_of(arguments))
        self.name = str(arguments.get("model") or arguments.get("pretrained"))
        self._max_gen_toks, self._thinks = max_gen_toks, enable_thinking

    # ---- text and ids ----

    @property
    def eot_token_id(self) -> int:
        """Return the id before a text without context: BOS, without which these models are lost."""
        return self.model.tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Return the most tokens of context and continuation together."""
        return self.model.engine.context

    @property
    def tokenizer_name(self) -> str:
        """Return what lm-eval's caches of requests are told apart by."""
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return ids, with exactly one BOS unless it is refused."""
        return self.model.tokenizer.encode(string, bos=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the source of the template, by which lm-eval tells results apart."""
        found = self.model.template
        return None if found is None or not chat_template else found.source

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as text. Raises RequestError where the checkpoint has no template."""
        if self.model.template is None:
            raise RequestError("this checkpoint has no chat template; leave --apply_chat_template out")
        return self.model.template.render(
            chat_history,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
            enable_thinking=self._thinks,
        )

    # ---- likelihoods ----

    def _loglikelihood_tokens(self, requests: Sequence[Any], disable_tqdm: bool = False, **_: Any) -> list[tuple[float, bool]]:
        """Score pairs of ids; the context loses its middle where both are too long, and keeps its BOS."""
        pairs = [Pair(self._fitted(context, continuation), tuple(continuation)) for _, context, continuation in requests]
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for index, score in score_pairs(self.model.loop, pairs, in_flight=self.model.in_flight):
                answers[index] = score.logprob, score.is_greedy
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
                bar.update()
        return answers

    def _fitted(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[int, ...]:
        """Return as much of a context's end as fits, behind its first id."""
        over = len(context) + len(continuation) - 1 - self.max_length
        if over <= 0:
            return tuple(context)
        if over >= len(context) - 1:
            raise RequestError(f"a continuation of {len(continuation)} tokens does not fit the context of {self.max_length}")
        log.warning("a context of %d tokens loses %d behind its first; raise max_length", len(context), over)
        return (context[0], *context[1 + over :])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, in windows as long as the context; the first begins with BOS."""
        windows, owners = list[Any](), list[int]()
        bos = self.eot_token_id
        for place, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])[1:]  # the window brings the BOS
            for window in utils.get_rolling_token_windows(ids, bos, self.max_length, 1):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(place)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += logprob
        for request, logprob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    # ---- replies ----

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return replies without stop strings, markers and thoughts. Raises the GemcutterError of a request that fails."""
        running, found = list[Any](), list[str]()
        bar = tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm)
        try:
            for request in requests:
                running.append((request, self._submit(*request.args)))
                if len(running) >= self.model.in_flight:
                    found.append(self._finish(*running.pop(0)))
                    bar.update()
            while running:
                found.append(self._finish(*running.pop(0)))
                bar.update()
        finally:
            bar.close()
            for _, stream in running:
                stream.close()
        return found

    def _submit(self, context: str, asked: Mapping[str, Any], media: Mapping[str, Any] | None = None) -> Any:
        options = self._options(asked)
        if images := (media or {}).get("visual"):
            context, options["images"] = context.replace(PLACEHOLDER, IMAGE), list(images)
        return self.model.submit(self.model.prepare(context, **options))

    def _options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Return a request's options from lm-eval's; what it calls otherwise is translated, the rest handed on."""
        given = dict(asked)
        lengths = [given.pop(name) for name in LENGTHS if name in given]
        until = given.get("until") or []
        stop, stop_ids = list[str](), list[int]()
        for text in [until] if isinstance(until, str) else until:
            if (id := self.model.tokenizer.id_of(text)) is not None and id in self.model.tokenizer.special_ids:
                stop_ids.append(id)
            elif text:
                stop.append(text)
        does_sample = given.get("do_sample", bool(given.get("temperature")))
        options = {name: value for name, value in given.items() if name not in IGNORED}
        options["temperature"] = float(given.get("temperature", 1.0)) if does_sample else 0.0
        options["max_tokens"] = int(lengths[0]) if lengths else self._max_gen_toks
        options["stop"], options["stop_token_ids"] = stop or None, stop_ids or None
        return options

    def _finish(self, request: Any, stream: Any) -> str:
        text = str(stream.finish().text)
        self.cache_hook.add_partial("generate_until", request.args, text)
        return text
