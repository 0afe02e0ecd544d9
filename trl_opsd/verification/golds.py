# SPDX-License-Identifier: Apache-2.0
"""Gold answers that are no mathematics, of which math-verify would make some."""

import re

from .answers import last_answer, last_box

_LONGEST_ANSWER = 80  # characters of a text without a box; a longer one is a solution, in which the answer is not known
_LEADING_ZERO = re.compile(r"0\d+(?:\.\d+)?")
_DATE = re.compile(r"\d{1,4}([-/.])\d{1,2}\1\d{1,4}(?:[T ].*)?|\d+(?:-\d+){2,}")
_WORD = r"[^\W\d_]+"
_WORDS = re.compile(rf"{_WORD}(?:[\s,'’-]+{_WORD})*[.!?]?")
_PLAIN_TEXT = re.compile(r"\\(?:text|textbf|textit|mathrm)\s*\{[^{}]*\}")
# Words that are mathematics without a backslash.
_KNOWN = re.compile(
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|pi|rho|sigma|tau|phi|psi|omega|oo|inf|infinity|infty|nan|"
    "(?:arc)?(?:sin|cos|tan)|(?:sin|cos|tan)h|cot|sec|csc|ln|log|exp|sqrt|det|deg|gcd|lcm|lim|max|min|mod|sup",
    re.IGNORECASE,
)


def why_no_mathematics(solution: str) -> str | None:
    """What the gold answer of a solution is instead of a number or a formula; None for mathematics, or where unknown."""
    boxed = last_box(solution)
    if boxed is None and len(solution.strip()) > _LONGEST_ANSWER:
        return None
    if boxed is not None and _PLAIN_TEXT.fullmatch(boxed.strip()):
        return None  # math-verify takes it for one symbol
    answer = last_answer(solution) or ""
    if _LEADING_ZERO.fullmatch(answer):
        return "number with leading zeros"
    if _DATE.fullmatch(answer):
        return "date or other code"
    if _WORDS.fullmatch(answer) and any(
        len(word) > 1 and not _KNOWN.fullmatch(word) for word in re.findall(_WORD, answer)
    ):
        return "word"
    return None
