# SPDX-License-Identifier: Apache-2.0
"""Whether the answer in a text is the reference's: by math-verify, as text, by letter, or by a function of one's own.

`math` runs in processes of its own (`pool`, `worker`), so that no text can hold up or end a run.
"""

from collections.abc import Callable, Sequence
from functools import partial

from ..user_functions import load_function
from . import pool
from .answers import choice_letter, exact_answer, last_answer
from .golds import why_no_mathematics
from .pool import Verdict

__all__ = [
    "Verdict",
    "check_verifier",
    "start_verifying",
    "verifies",
    "verify",
    "warn_of_golds",
    "which_verify",
]

Pair = tuple[str, str]
# Reads the answer in a text, None where there is none; equal answers are equal strings.
_READERS: dict[str, Callable[[str], str | None]] = {"exact": exact_answer, "choice": choice_letter}


def start_verifying(pairs: Sequence[Pair], verifier: str = "math") -> Callable[[], list[Verdict]]:
    """Begin to compare the answers of texts with those of references.

    Args:
        pairs: a text and a reference solution each; the last answer of both counts.
        verifier: `math`, `exact`, `choice`, or `module:function`.

    Returns:
        A function that waits for the verdicts, one a pair in their order. Until then the caller may do other work.

    Raises:
        ValueError: there is no such verifier.
    """
    if verifier == "math":
        return pool.start(pairs).results
    if verifier in _READERS:
        judge = partial(_compare, _READERS[verifier])
    else:
        judge = partial(_ask_function, verifier, _load(verifier))
    verdicts = [judge(text, gold) for text, gold in pairs]
    return lambda: verdicts


def verify(completion: str, solution: str, verifier: str = "math") -> bool:
    """Whether the answer in `completion` equals the one in `solution`; False where either cannot be read."""
    return bool(start_verifying([(completion, solution)], verifier)()[0].is_right)


def verifies(solution: str, verifier: str = "math") -> bool:
    """Whether `solution` holds an answer that the verifier can read."""
    return which_verify([solution], verifier)[0]


def which_verify(solutions: Sequence[str | None], verifier: str = "math") -> list[bool]:
    """For each solution whether it holds an answer that the verifier can read; a function of one's own is not asked."""
    texts = [solution or "" for solution in solutions]
    if verifier == "math":
        return [verdict.answer is not None for verdict in start_verifying([(text, "") for text in texts])()]
    read = _READERS.get(verifier, last_answer)
    return [read(text) is not None for text in texts]


def check_verifier(verifier: str, place: str = "verifier") -> None:
    """See that there is such a verifier.

    Raises:
        ValueError: names `place` and says what it may be.
    """
    if verifier != "math" and verifier not in _READERS:
        _load(verifier, place)


def warn_of_golds(solutions: Sequence[str | None], verifier: str, place: str) -> str | None:
    """What a user is to know before answers that are no mathematics are read as such; None where none are.

    Args:
        solutions: references.
        verifier: that is set; only `math` reads them as mathematics.
        place: of the rows, for the message.
    """
    if verifier != "math":
        return None
    reasons = {row: why_no_mathematics(text) for row, text in enumerate(solutions) if text}
    suspects = [row for row, reason in reasons.items() if reason is not None]
    read = which_verify([solutions[row] for row in suspects])  # what is not read cannot be called right
    found = {row: reasons[row] for row, is_read in zip(suspects, read, strict=True) if is_read}
    if not found:
        return None
    row, reason = next(iter(found.items()))
    kinds = ", ".join(sorted(set(found.values())))
    return (
        f"{place}: {len(found)} of {len(solutions)} gold answers are no number or formula ({kinds}); the first is "
        f"{last_answer(solutions[row] or '')!r} in row {row}, a {reason}. verifier='math' reads letters as symbols that commute "
        "('tac' equals 'cat'), dates as differences and drops leading zeros, so wrong answers count as right. Set verifier "
        "to 'exact' for words, dates and codes, to 'choice' for letters of options, or to your own 'module:function'."
    )


def _compare(read: Callable[[str], str | None], text: str, gold: str) -> Verdict:
    wanted, found = read(gold), read(text)
    return Verdict(None if wanted is None else found == wanted, found)


def _ask_function(name: str, function: Callable[[str, str], bool | None], text: str, gold: str) -> Verdict:
    value = function(text, gold)
    if value is not None and value not in (True, False):
        raise ValueError(f"verifier={name!r} returned {value!r}; it must return True, False, or None for no score.")
    return Verdict(None if value is None else bool(value), last_answer(text))


def _load(verifier: str, place: str = "verifier") -> Callable[[str, str], bool | None]:
    """The function that `module:function` names."""
    allowed = f"one of math, {', '.join(_READERS)}, or `module:function`"
    return load_function(verifier, place, takes="(text, solution)", allowed=allowed)
