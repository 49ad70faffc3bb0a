"""GSM8K: grade-school mathematics, answers are numbers, in the four ways in which its numbers are made.

The data is openai/gsm8k's, or the files of GitHub's grade-school-math. Sources: Cobbe et al., "Training Verifiers to Solve Math
Word Problems", 2021; SGLang's few_shot_gsm8k, lm-eval 0.4.13, sgl-eval 0.1.3. The examples of `lm-eval-cot` are those of Wei et
al., "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models", 2022, table 20.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gemcutter.errors import RequestError
from gemcutter.evals import shots
from gemcutter.evals.data import Data, Layout, field
from gemcutter.evals.extract import is_exact_match, last_boxed, pick_match
from gemcutter.evals.numbers import last_digits, read_number
from gemcutter.evals.task import SGL_EVAL, Asked, Grade, Item, Mode, Reply
from gemcutter.evals.tasks.gsm8k_examples import EXAMPLES

BOXED = "Solve the following math problem. Make sure to put the answer (and only answer) inside \\boxed{{}}.\n\n{}"
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")  # of answers and replies, by lm-eval
HASHES = re.compile(r"#### (\-?[0-9\.\,]+)")
SENTENCE = re.compile(r"The answer is (\-?[0-9\.\,]+).")
ANY_NUMBER = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
LM_EVAL_TOKENS = 256  # what lm-eval allows where a task names no cap

SGLANG = Mode(
    "sglang-raw5",
    "the test's first five as examples, raw text (SGLang's few_shot_gsm8k)",
    "generate",
    "gsm8k-raw-1",
    shots=5,
    max_tokens=512,
    stop=("Question", "Assistant:", "<|separator|>"),
)
LM_EVAL = Mode(
    "lm-eval",
    "five examples drawn from the training part, raw text (lm-eval's gsm8k)",
    "generate",
    "gsm8k-raw-1",
    shots=5,
    max_tokens=LM_EVAL_TOKENS,
    stop=("Question:", "</s>", "<|im_end|>"),
)
LM_EVAL_COT = Mode(
    "lm-eval-cot",
    "eight examples with reasoning, raw text (lm-eval's gsm8k_cot)",
    "generate",
    "gsm8k-cot-1",
    shots=len(EXAMPLES),
    max_tokens=LM_EVAL_TOKENS,
    stop=("Q:", "</s>", "<|im_end|>"),
)
SGL = Mode(
    "sgl-eval",
    "no examples, the answer in a box (sgl-eval 0.1.3)",
    "generate",
    "gsm8k-boxed-1",
    is_chat=True,
    max_tokens=2048,
    sampling=SGL_EVAL,
    can_think=True,
)
Pair = tuple[str, str]  # a question and its answer


def layouts(split: str) -> tuple[Layout, ...]:
    """Return where a split may be: the hub's parquet, or GitHub's files."""
    return (Layout((f"main/{split}-*", f"main/{split}", f"{split}-*", split, f"grade_school_math/data/{split}")),)


class Gsm8k:
    """The task."""

    name = "gsm8k"
    about = "GSM8K: grade-school mathematics, answers are numbers"
    modes: Sequence[Mode] = (SGLANG, LM_EVAL, LM_EVAL_COT, SGL)
    media: Sequence[str] = ()

    def items(self, data: Data, mode: Mode, asked: Asked) -> Iterator[Item]:
        """Yield the test's questions in order. Raises RequestError."""
        questions = _read(data, "test")
        headers = _headers(data, mode, asked, questions)
        for number, ((question, answer), header) in enumerate(zip(questions, headers, strict=True)):
            if mode is SGL:
                prompt: str | list[dict[str, str]] = [{"role": "user", "content": BOXED.format(question)}]
            else:
                prompt = header + (_cot(question) if mode is LM_EVAL_COT else _raw(question))
            yield Item(str(number), prompt, answer.rpartition("####")[2].strip(), about={"answer": answer})

    def grade(self, item: Item, mode: Mode, reply: Reply, asked: Asked) -> Grade:
        """Compare the number that was given with the right one; lm-eval finds it in a strict and in a lenient way."""
        if mode is SGL:
            boxed = last_boxed(reply.text)
            found = None if boxed is None else read_number(boxed)
            return Grade(boxed, {"accuracy": float(found is not None and found == read_number(item.gold))})
        if mode is SGLANG:
            number = last_digits(reply.text)
            return Grade(number, {"accuracy": float(number is not None and number == last_digits(item.about["answer"]))})
        strict = pick_match(HASHES if mode is LM_EVAL else SENTENCE, reply.text)
        given = {"strict-match": strict, "flexible-extract": pick_match(ANY_NUMBER, reply.text, -1)}
        right = item.about["answer"] if mode is LM_EVAL else item.gold
        metrics = {
            name: float(number is not None and is_exact_match(number, right, ignored=IGNORED)) for name, number in given.items()
        }
        return Grade(given if any(given.values()) else None, metrics)


def _read(data: Data, split: str) -> list[Pair]:
    """Return a split's questions and answers. Raises RequestError."""
    found = list[Pair]()
    for number, row in enumerate(data.rows(f"gsm8k, split {split}", layouts(split)), 1):
        where = f"gsm8k, split {split}, row {number}"
        question, answer = field(row, "question", str, where), field(row, "answer", str, where)
        if read_number(answer.rpartition("####")[2]) is None or "####" not in answer:
            raise RequestError(f"{where}: 'answer': expected to end in '#### ' and a number, found {answer[-40:]!r}")
        found.append((question, answer))
    return found


def _headers(data: Data, mode: Mode, asked: Asked, questions: Sequence[Pair]) -> Iterator[str]:
    """Yield what stands before each question. Raises RequestError."""
    count = (mode.shots if asked.shots is None else asked.shots) or 0
    if mode is LM_EVAL:
        pool = _read(data.beside(), "train") if count else []
        for drawn in shots.draws(pool, count, "gsm8k, split train", questions):
            yield "".join(f"{_raw(question)} {answer}\n\n" for question, answer in drawn)
        return
    if mode is LM_EVAL_COT:
        shown, write = shots.first(EXAMPLES, count, "gsm8k, written examples"), _cot
    else:
        shown, write = shots.first(questions, count, "gsm8k, split test"), _raw
    header = "".join(f"{write(question)} {answer}\n\n" for question, answer in shown)
    for _ in questions:
        yield header


def _raw(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _cot(question: str) -> str:
    return f"Q: {question}\nA:"
