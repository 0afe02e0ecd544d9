# SPDX-License-Identifier: Apache-2.0
"""The answer in a text as text: its last box, what stands in it, and the letter of a choice."""

import re
import unicodedata

_BOX_OR_BRACE = re.compile(r"(\\boxed\s*\{)|\\.|([{}])", re.DOTALL)
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mathsf|mathtt)\s*\{([^{}]*)\}")
_MATH_MARKS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
# What an option looks like where nothing else stands: B, (B), B., B) 12 cm.
_OPTION = re.compile(r"[*_]*\(?([A-Ja-j])(?:\)?[*_]*[.:]?|[).:]\s.*)", re.DOTALL)
_SAID = re.compile(r"(?i:answer\s*:|(?:answer|option|choice)\s+is\b:?)\s*[*_$]*(?:\(([A-Ja-j])\)|([A-J])(?![\w'’]))")
_IN_BRACKETS = re.compile(r"\(([A-J])\)")


def last_box(text: str) -> str | None:
    """What the last whole `\\boxed{}` of a text holds, the inner one of two; None if there is none."""
    opened: list[int | None] = []  # of every open brace, where the content of its box begins
    found = None
    for match in _BOX_OR_BRACE.finditer(text):
        if match[1]:
            opened.append(match.end())
        elif match[2] == "{":
            opened.append(None)
        elif match[2] and opened:
            start = opened.pop()
            if start is not None and (found is None or found[0] < start):  # else it is around the one found
                found = start, match.start()
    return None if found is None else text[slice(*found)]


def last_answer(text: str) -> str | None:
    """The content of the last box, or the whole text without one, bare of wrappers; None where that is empty."""
    boxed = last_box(text)
    answer = (text if boxed is None else boxed).strip()
    for left, right in _MATH_MARKS:
        if len(answer) >= len(left + right) and answer.startswith(left) and answer.endswith(right):
            answer = answer[len(left) : -len(right)]
            break
    return " ".join(_WRAPPED.sub(r"\1", answer).split()) or None


def exact_answer(text: str) -> str | None:
    """The answer as text, apart from spacing, case, width of characters and a full stop at its end."""
    answer = last_answer(text)
    return (
        None if answer is None else unicodedata.normalize("NFKC", answer).removesuffix(".").casefold().strip() or None
    )


def choice_letter(text: str) -> str | None:
    """The option, A to J, that a text chooses: boxed, alone, said to be the answer, or last in brackets."""
    answer = last_answer(text)
    if answer is None:
        return None
    if last_box(text) is None:
        for pattern in (_SAID, _IN_BRACKETS):
            found = pattern.findall(answer)
            if found:
                return "".join(found[-1]).upper()
    alone = _OPTION.fullmatch(answer)
    return None if alone is None else alone[1].upper()
