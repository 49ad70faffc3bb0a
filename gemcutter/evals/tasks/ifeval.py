"""IFEval: instructions whose keeping a program can check, such as "no commas" or "at least 300 words".

The data is google/IFEval's parquet or JSON lines. The checkers are lm-eval's own, which the extra `ifeval` installs, with NLTK's
tables of sentence ends. Source: Zhou et al., "Instruction-Following Evaluation for Large Language Models", 2023.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply

LAYOUTS = (Layout(("data/train-*", "train-*", "train", "ifeval_input_data", "input_data")),)
TABLES = "tokenizers/punkt_tab/english/"
INSTALL = "the checkers are lm-eval's; install them with: pip install 'gemcutter[ifeval]'"
GET_TABLES = (
    "NLTK's tables punkt_tab are not installed; where there is a network run `python -m nltk.downloader -d FOLDER punkt_tab`, "
    "and set NLTK_DATA to that folder"
)
METRICS = {
    "prompt_strict": "prompt_level_strict_acc",
    "inst_strict": "inst_level_strict_acc",
    "prompt_loose": "prompt_level_loose_acc",
    "inst_loose": "inst_level_loose_acc",
}


class Ifeval:
    """The task."""

    name = "ifeval"
    about = "IFEval: instructions that a program can check"
    modes: Sequence[Mode] = (
        Mode("chat", "one user turn, 1280 tokens", "generate", "ifeval-chat-1", is_chat=True, max_tokens=1280, can_think=True),
        Mode("raw", "the prompt as raw text, 1280 tokens (lm-eval's ifeval)", "generate", "ifeval-raw-1", max_tokens=1280),
    )
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield all prompts. Raises RequestError, for a missing checker, too."""
        checkers = _checkers()
        for number, row in enumerate(data.rows("ifeval", LAYOUTS), 1):
            key = field(row, "key", int, f"ifeval, row {number}")
            about = _read(row, f"ifeval, row {number} (key {key})", checkers)
            text = about["prompt"]
            prompt = [{"role": "user", "content": text}] if mode.is_chat else text
            yield Item(str(key), prompt, about["instruction_id_list"], about=about | {"key": key})

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Check each instruction, on the reply as it is and on forms of it without its first or last line and asterisks."""
        from lm_eval.tasks.ifeval import utils

        _seed()
        found = utils.process_results(dict(item.about), [reply.text])
        metrics = {name: _share(found[theirs]) for name, theirs in METRICS.items()}
        count = len(item.about["instruction_id_list"])
        kept = [bool(each) for each in found["inst_level_strict_acc"]]
        return Grade(kept if reply.text.strip() else None, metrics, {name: count for name in METRICS if name.startswith("inst")})


def _share(found: bool | Sequence[bool]) -> float:
    return float(found) if isinstance(found, bool) else sum(found) / len(found)


def _checkers() -> Mapping[str, Any]:
    """Return lm-eval's checkers by their names. Raises RequestError that says what to install."""
    try:
        import immutabledict  # noqa: F401
        import langdetect  # noqa: F401
        import nltk
    except ImportError as error:
        raise RequestError(f"ifeval: {error.name} is not installed; {INSTALL}") from None
    try:
        nltk.data.find(TABLES)
    except LookupError:  # asked first, since lm-eval would fetch them
        raise RequestError(f"ifeval: {GET_TABLES}") from None
    try:
        from lm_eval.tasks.ifeval import instructions_registry
    except ImportError as error:
        raise RequestError(f"ifeval: {error.name} is not installed; {INSTALL}") from None
    found: Mapping[str, Any] = instructions_registry.INSTRUCTION_DICT
    return found


def _seed() -> None:
    """Make langdetect say the same of the same text each time: it draws at random unless it is told not to."""
    import langdetect

    langdetect.DetectorFactory.seed = 0


def _read(row: Row, where: str, checkers: Mapping[str, Any]) -> dict[str, Any]:
    """Return what lm-eval's judge reads. Raises RequestError."""
    names, arguments = field(row, "instruction_id_list", list, where), field(row, "kwargs", list, where)
    if unknown := [name for name in names if name not in checkers]:
        raise RequestError(f"{where}: 'instruction_id_list': lm-eval has no checker {unknown[0]!r}")
    if not names or len(arguments) != len(names) or not all(isinstance(each, dict) for each in arguments):
        raise RequestError(f"{where}: 'kwargs': expected an object for each of the {len(names)} instructions")
    prompt = field(row, "prompt", str, where)
    for name, given in zip(names, arguments, strict=True):
        try:
            checkers[name](name).build_description(**{key: value for key, value in given.items() if value})
        except (TypeError, ValueError, AttributeError) as error:
            raise RequestError(f"{where}: 'kwargs' of {name}: {error}") from None
    return {"prompt": prompt, "instruction_id_list": names, "kwargs": arguments}
