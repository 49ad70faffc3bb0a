"""MMMU-Pro: MMMU's questions made harder, with ten options or four, or as a picture of the whole page.

The data is MMMU/MMMU_Pro's parquet. Its three parts are three tests, whose numbers are not compared. Sources: Yue et al.,
"MMMU-Pro: A More Robust Multi-discipline Multimodal Understanding Benchmark", 2024, mmmu-pro/prompts.yaml; sgl-eval 0.1.3.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gemcutter.errors import RequestError
from gemcutter.evals.data import Data, Layout, Row, field
from gemcutter.evals.extract import LETTERS, final_letter
from gemcutter.evals.extract_mmmu import mmmu_pro_letter
from gemcutter.evals.task import Asked, Grade, Item, Mode, Reply
from gemcutter.evals.tasks.mmmu import NAMED_IMAGE, image_part, name_row, read_options, with_images

PARTS = {"standard10": "standard (10 options)", "standard4": "standard (4 options)", "vision": "vision"}
LAST_LINE = (
    "The last line of your response should be of the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of "
    "options."
)
STEPS = "Think step by step before answering."
SHORT = "Answer with the option letter from the given choices directly."
WORDINGS = {
    "standard-cot": f"Answer the preceding multiple choice question. {LAST_LINE} {STEPS}",
    "standard-direct": SHORT,
    "vision-cot": f"Write out the multiple-choice question in the image and then solve it. {LAST_LINE} {STEPS}",
    "vision-direct": f"{SHORT} {LAST_LINE}",
}
SGL_EVAL = (
    "Answer the following multiple choice question. The last line of your response should be of the following format: 'Answer: "
    "$LETTER' (without quotes) where LETTER is one of the options. Think step by step before answering.\n\n{}"
)
SGL_EVAL_VISION = (
    "Answer the following multiple choice question. The last line of your response should be in the following format: 'Answer: "
    "A/B/C/D/E/F/G/H/I/J' (e.g. 'Answer: A').\n\n{}"
)
OF_SGL_EVAL = {"sgl-eval": "standard10", "sgl-eval-vision": "vision"}
SAMPLING = {"temperature": 0.0, "top_p": 0.95, "min_p": 0.0, "repetition_penalty": 1.0}


def _own_modes() -> Iterator[Mode]:
    for part, folder in PARTS.items():
        for how, told, cap in (("direct", "the letter at once", 128), ("cot", "step by step", 4096)):
            about = f"{folder}, {told} (MMMU-Pro's own wording and rule)"
            id = f"mmmu-pro-{part}-{how}-1"
            yield Mode(f"{part}-{how}", about, "generate", id, is_chat=True, max_tokens=cap, can_think=how == "cot")


def _sgl_mode(name: str) -> Mode:
    about = f"{PARTS[OF_SGL_EVAL[name]]}, step by step (sgl-eval 0.1.3)"
    return Mode(name, about, "generate", f"mmmu-pro-{name}-1", is_chat=True, max_tokens=2048, sampling=SAMPLING, can_think=True)


class MmmuPro:
    """The task."""

    name = "mmmu-pro"
    about = "MMMU-Pro: questions about images, ten options, four, or all in a picture"
    modes: Sequence[Mode] = (*_own_modes(), *map(_sgl_mode, OF_SGL_EVAL))
    media: Sequence[str] = ("image",)

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the questions of the mode's part. Raises RequestError."""
        folder = PARTS[_part(mode)]
        layouts = (Layout((f"{folder}/test-*", f"{folder}/test", f"{folder}-test")), Layout(("test-*", "test")))
        for number, row in enumerate(data.rows(f"mmmu-pro, {folder}, split test", layouts), 1):
            id, where = name_row(f"mmmu-pro, {folder}", row, number)
            options = dict(zip(LETTERS, read_options(row, where), strict=False))
            answer = field(row, "answer", str, where)
            if answer not in options:
                raise RequestError(f"{where}: 'answer': expected a letter of the {len(options)} options, found {answer!r}")
            content = _content(row, mode, options, where)
            prompt = [{"role": "user", "content": content}]
            yield Item(id, prompt, answer, row.get("subject") or "", about={"options": options})

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the letter with the right one. A reply that names none is wrong."""
        of_sgl_eval = mode.name in OF_SGL_EVAL
        letter = final_letter(reply.text) if of_sgl_eval else mmmu_pro_letter(reply.text, item.about["options"])
        return Grade(letter, {"accuracy": float(letter == item.gold)})


def _part(mode: Mode) -> str:
    return OF_SGL_EVAL.get(mode.name) or mode.name.partition("-")[0]


def _content(row: Row, mode: Mode, options: Mapping[str, str], where: str) -> list[Mapping[str, Any]]:
    of_sgl_eval = mode.name in OF_SGL_EVAL
    mark = ") " if of_sgl_eval else ". "
    lines = "\n".join(f"{letter}{mark}{option}" for letter, option in options.items())
    if _part(mode) == "vision":
        text = SGL_EVAL_VISION.format(f"\n\n{lines}") if of_sgl_eval else WORDINGS[mode.name]
        return [image_part(row, "image", where), {"type": "text", "text": text}]
    question = field(row, "question", str, where)
    if of_sgl_eval:
        text = SGL_EVAL.format(f"{question.strip(chr(10))}\n\n{lines}")
    else:
        text = f"{question}\n{lines}\n{WORDINGS['standard-' + mode.name.partition('-')[2]]}"
    content = with_images(text, row, where)
    if not NAMED_IMAGE.search(question) and row.get("image_1") is not None and not NAMED_IMAGE.search(lines):
        content.append(image_part(row, "image_1", where))  # named nowhere: sgl-eval shows it after the text
    return content
