# SPDX-License-Identifier: Apache-2.0
"""Token ids of the teacher's contexts, each encoded once a generation batch; those known early in a thread meanwhile."""

import copy
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

from ..rows.texts import Prompt
from .contexts import TeacherContext
from .prompts import EncodedContext, TeacherCollator

Pair = tuple[Prompt, TeacherContext]


class ContextEncoder:
    """A collator that remembers what it encoded of a generation batch.

    Args:
        collator: of the run.
    """

    def __init__(self, collator: TeacherCollator):
        self.collator = collator
        self._encoded: dict[tuple, EncodedContext] = {}
        self._ahead: Future | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._own: TeacherCollator | None = None  # the thread's

    def forget(self) -> None:
        """Begin a generation batch."""
        self._encoded, self._ahead = {}, None

    def encode(self, prompt: Prompt, view: TeacherContext) -> EncodedContext:
        """See `TeacherCollator.encode`; waits for the thread where this may be its work."""
        key = _key(prompt, view)
        if key not in self._encoded and self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            self._encoded |= ahead.result() if ahead.exception() is None else {}
        if key not in self._encoded:
            self._encoded[key] = self.collator.encode(prompt, view)
        return self._encoded[key]

    def begin(self, pairs: Callable[[], Iterable[Pair]]) -> None:
        """Encode contexts in a thread. What cannot be encoded there is left to `encode`, which raises.

        A tokenizer written in Python holds the interpreter, so that nothing would be gained: then this does nothing.

        Args:
            pairs: gives prompts and views; called in the thread.
        """
        if not getattr(self.collator.tokenizer, "is_fast", False):
            return
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="encode-contexts")
        self._ahead = self._thread.submit(self._encode_all, pairs)

    def _encode_all(self, pairs: Callable[[], Iterable[Pair]]) -> dict[tuple, EncodedContext]:
        if self._own is None:  # a fast tokenizer cannot be used by two threads at a time
            self._own = replace(self.collator, tokenizer=copy.deepcopy(self.collator.tokenizer))
        found: dict[tuple, EncodedContext] = {}
        for prompt, view in pairs():
            key = _key(prompt, view)
            if key not in found:
                try:
                    found[key] = self._own.encode(prompt, view)
                except ValueError:
                    continue
        return found


def _key(prompt: Prompt, view: TeacherContext) -> tuple:
    return (str(prompt), view.template, view.slot, view.slot_tokens, view.texts, view.opening, view.own_prompt)
