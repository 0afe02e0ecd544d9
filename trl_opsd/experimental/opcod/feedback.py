# SPDX-License-Identifier: Apache-2.0
"""Feedback of a served peer on each rollout, as SDPO's `feedback_function` (OPCoD, arXiv 2606.14368).

    feedback_function: trl_opsd.experimental.opcod.feedback:peer_feedback

The peer speaks on a domain where its accuracy on a held-out slice is above one's own. Its text loses boxed answers, and one in which
the row's answer still stands is dropped. A rollout without feedback is SDPO's own. Inferred: the gate's rule, the filter, the
question that the peer is asked and that the loss is SDPO's; the paper updates both models together, here they take turns.
"""

import json
import os
import re
import threading
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from ...rows.texts import fill_template, message_text
from ...teacher.contexts import Rollout
from ...verification.answers import last_answer, last_box
from .server import PeerServer
from .settings import PeerSettings

_INFERRED = (
    "Feedback of a peer is experimental. The rule of its gate, the filter of answers, what the peer is asked and that the loss is "
    "SDPO's are inferred; the two models take turns, where the paper updates both together (docs/methods/sdpo.md)."
)
_BOX = re.compile(r"\\boxed\s*\{(?:[^{}]|\{[^{}]*\})*\}")
_NUMBER = re.compile(r"\d+(?:[.,/]\d+)*")
DOMAIN = "domain"


class PeerFeedback:
    """A function from a rollout to the peer's feedback on it, or None.

    Attributes:
        counts: rollouts by what became of them: `shut` (the gate), `no_solution` (nothing to filter by), `leaked`, `blank`, `given`;
            and of the server `calls`, `cached` and `failed`.
        calls_at_once: see `trl_opsd.user_functions.call_for_each`.

    Args:
        settings: of the peer.
        server: that is asked; one of `settings` if None.
    """

    def __init__(self, settings: PeerSettings, server: Any = None):
        self.settings, self.counts, self._lock = settings, Counter(), threading.Lock()
        self.server = server or PeerServer(settings, self._count)
        self.calls_at_once = settings.calls_at_once
        warnings.warn(_INFERRED, stacklevel=2)

    def __call__(self, rollout: Rollout) -> str | None:
        """The peer's feedback, None where it may not speak or says the answer.

        Raises:
            PeerUnavailable: it does not answer; SDPO then has no feedback on the rollout, and warns.
        """
        reason, text = "shut", None
        if self.is_open(rollout.columns.get(DOMAIN) or "all"):
            reason, text = self._feedback(rollout)
        self._count(reason)
        return text

    def is_open(self, domain: str) -> bool:
        """Whether the peer is the better one on a domain; a domain without both numbers is shut."""
        own, peer = self.settings.own_accuracy.get(domain), self.settings.peer_accuracy.get(domain)
        return own is not None and peer is not None and peer > own

    def question(self, rollout: Rollout) -> str:
        """What the peer is asked of a rollout."""
        problem = rollout.prompt if isinstance(rollout.prompt, str) else message_text(rollout.prompt[-1])
        words = problem.lower()
        named = [name for name, marks in self.settings.concepts.items() if any(mark.lower() in words for mark in marks)]
        concepts = f" Speak of these concepts: {', '.join(named)}." if named else ""
        template = self.settings.question_template
        return fill_template(template, prompt=problem, attempt=rollout.completion, concepts=concepts)

    def _feedback(self, rollout: Rollout) -> tuple[str, str | None]:
        if not rollout.solution:
            return "no_solution", None
        text = _BOX.sub("", self.server.ask(self.question(rollout))).strip()
        if not text:
            return "blank", None
        return ("leaked", None) if tells_answer(text, rollout.solution) else ("given", text)

    def _count(self, name: str) -> None:
        """Count, and keep the counts in the cache's folder, a file for each process."""
        with self._lock:
            self.counts[name] += 1
            file = Path(self.settings.cache_folder) / f"counts-{os.environ.get('RANK', '0')}.json"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(self.counts, sort_keys=True), encoding="utf-8")


def tells_answer(text: str, solution: str) -> bool:
    """Whether a text holds the answer of a solution as a word of its own: its last box, without one its last number or all of it."""
    numbers = _NUMBER.findall(solution)
    answer = last_box(solution) or (numbers[-1] if numbers else last_answer(solution) or solution)
    text, answer = text.lower(), answer.lower().strip(" .")
    is_word = re.search(rf"(?<![\w.]){re.escape(answer)}(?!\w|\.\d)", text) if answer else None
    # A long answer is found however it is spaced; a short one would be found within other words.
    squeezed = re.sub(r"\s+", "", answer)
    return bool(is_word) or (len(squeezed) > 4 and squeezed in re.sub(r"\s+", "", text))


def __getattr__(name: str) -> Any:
    """`peer_feedback`, made of the environment's settings where it is first asked for: a recipe's settings are checked with it."""
    if name != "peer_feedback":
        raise AttributeError(name)
    globals()[name] = PeerFeedback(PeerSettings.from_environment())
    return globals()[name]
