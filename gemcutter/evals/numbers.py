"""Numbers in replies, read and compared as the tools do whose scores are compared with ours.

Owns the last digits of a reply as SGLang finds them, and sgl-eval's comparison of a final answer with a number. That one computes
with formulas (math-verify), and this one reads numbers alone: decimals, fractions and mixed numbers, with their usual wrapping in
LaTeX. An answer left as a sum or a product counts as wrong here. Read `extract.py` for letters.
"""

from __future__ import annotations

import re
from fractions import Fraction

DIGITS = re.compile(r"\d+")
MOST_DIGITS = 4300  # that Python turns into a number

WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|boxed)\s*\{([^{}]*)\}")
DROPPED = re.compile(r"\\[;!\\ ]|\\,(?!\d)|\\(?:left|right|quad|displaystyle)(?![a-zA-Z])|\^\s*\{?\\circ\}?|\\?\$")
NAMED = re.compile(r"^[a-zA-Z]\s*=\s*")
WHOLE = re.compile(r"-?(?:0|[1-9]\d*)", re.ASCII)
PERCENT = re.compile(r"^(\d+\.?\d*)\\?%$", re.ASCII)
THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:(?:,|\{,\})\d{3})+(?:\.\d*)?", re.ASCII)
DECIMAL = re.compile(r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)", re.ASCII)
RATIO = re.compile(rf"({DECIMAL.pattern})/({DECIMAL.pattern})", re.ASCII)
FRACTION = re.compile(
    r"([+-]?)(\d*)\\[dt]?frac(?:\{([+-]?\d+(?:\.\d+)?)\}|(\d))(?:\{([+-]?\d+(?:\.\d+)?)\}|(\d))",
    re.ASCII,
)


def last_digits(text: str) -> int | None:
    """Return the last run of digits as SGLang's few_shot_gsm8k does: commas are dropped, signs and decimals lost.

    A run that is no number in Python, such as 007, is none there either.
    """
    found = DIGITS.findall(text.replace(",", ""))
    if not found or not found[-1].isascii() or len(found[-1]) > MOST_DIGITS:
        return None
    digits: str = found[-1]
    return None if digits[0] == "0" and digits.strip("0") else int(digits)


def read_number(answer: str) -> Fraction | None:
    """Return the number that a final answer is, without units, currency and percent signs; None where it is none.

    Commas between thousands are read only where a sign and currency are all that stands around, as in sgl-eval.
    """
    if len(answer) > MOST_DIGITS:
        return None
    text = WRAPPED.sub(lambda found: found[1] if WHOLE.fullmatch(found[1]) else " ", answer)
    text = DROPPED.sub("", text).strip().rstrip(". ")
    if THOUSANDS.fullmatch(text):
        return Fraction(text.replace("{,}", "").replace(",", ""))
    text = PERCENT.sub(r"\1", NAMED.sub("", text))
    for opening, closing in ("()", "[]", "{}"):
        if text.startswith(opening) and text.endswith(closing):
            text = text[1:-1]
    return _number("".join(text.split()))


def _number(text: str) -> Fraction | None:
    if DECIMAL.fullmatch(text):
        return Fraction(text)
    if found := RATIO.fullmatch(text):
        return _over(Fraction(found[1]), Fraction(found[2]))
    if found := FRACTION.fullmatch(text):
        sign, whole, over, digit, under, low = found.groups()
        part = _over(Fraction(over or digit), Fraction(under or low))
        return None if part is None else (int(whole or 0) + part) * (-1 if sign == "-" else 1)
    return None


def _over(above: Fraction, below: Fraction) -> Fraction | None:
    return above / below if below else None
