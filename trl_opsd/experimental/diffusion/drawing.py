# SPDX-License-Identifier: Apache-2.0
"""Answers are sampled until one is right; what an optimizer step needs of it is kept (d-OPSD, arXiv 2606.18195)."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ...verification import Verdict, start_verifying
from .contexts import teacher_states
from .rows import EncodedRow
from .sampler import Denoised, Reader, denoise, text_length
from .settings import DiffusionOPSDSettings


@dataclass
class Sample:
    """A prompt's answer: the first right one, else the last that was sampled.

    Attributes:
        prompt: token ids.
        states: (n, C) int64 of the student.
        taught: (n, C) int64, the same as the teacher sees them.
        num_tokens: of the text.
        num_drawn: answers that were sampled.
        reason: why nothing is trained: `no_right_sample`, `unverified`, `too_few_states`, or None.
    """

    prompt: list[int]
    states: torch.Tensor
    taught: torch.Tensor
    num_tokens: int
    num_drawn: int
    reason: str | None


REASONS = ("no_right_sample", "unverified", "too_few_states")


@dataclass
class Drawer:
    """Samples and verifies.

    Args:
        tokenizer: decodes answers.
        settings: of the sampler and the teacher.
        mask_token_id: of a masked position.
        eos_token_id: that ends an answer.
        device: that the model answers from.
    """

    tokenizer: Any
    settings: DiffusionOPSDSettings
    mask_token_id: int
    eos_token_id: int
    device: torch.device

    def draw(self, read: Reader, rows: Sequence[EncodedRow], *, seed: int, step: int) -> list[Sample]:
        """One sample a row; what it is does not depend on the other rows.

        Args:
            read: the student, in evaluation mode.
            rows: of this process.
            seed: of the run.
            step: of the optimizer.
        """
        settings = self.settings
        found: dict[int, tuple[Denoised, Verdict, int]] = {}
        open_rows = list(range(len(rows)))
        for attempt in range(settings.num_samples):
            temperature = settings.later_temperature if attempt else settings.temperature
            seeds = [f"{seed}/{step}/{rows[place].index}/{attempt}" for place in open_rows]
            answers = denoise(
                read,
                [rows[place].prompt for place in open_rows],
                settings,
                mask_token_id=self.mask_token_id,
                eos_token_id=self.eos_token_id,
                temperature=temperature,
                generators=[_generator(text, self.device) for text in seeds],
            )
            verdicts = self._verify(answers, [rows[place].solution for place in open_rows])
            for place, answer, verdict in zip(open_rows, answers, verdicts, strict=True):
                found[place] = answer, verdict, attempt + 1
            open_rows = [place for place in open_rows if not found[place][1].is_right]
            if not open_rows:
                break
        return [self._sample(row, *found[place], seed=f"{seed}/{step}/{row.index}") for place, row in enumerate(rows)]

    def text(self, completion: torch.Tensor) -> str:
        """The text of an answer (C,), up to its end token."""
        return self.tokenizer.decode(completion[: text_length(completion, self.eos_token_id)], skip_special_tokens=True)

    def _verify(self, answers: Sequence[Denoised], solutions: Sequence[str]) -> list[Verdict]:
        texts = [self.text(answer.completion) for answer in answers]
        return start_verifying(list(zip(texts, solutions, strict=True)), self.settings.verifier)()

    def _sample(self, row: EncodedRow, answer: Denoised, verdict: Verdict, num_drawn: int, *, seed: str) -> Sample:
        generator = _generator(f"{seed}/teacher", torch.device("cpu"))
        taught = teacher_states(answer, self.settings, eos_token_id=self.eos_token_id, generator=generator)
        reason = None
        if verdict.is_right is None:
            reason = "unverified"
        elif not verdict.is_right:
            reason = "no_right_sample"
        elif len(answer.states) <= self.settings.updates_per_sample:
            reason = "too_few_states"
        num_tokens = text_length(answer.completion, self.eos_token_id)
        return Sample(list(row.prompt), answer.states, taught, num_tokens, num_drawn, reason)


def _generator(text: str, device: torch.device) -> torch.Generator:
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
    return torch.Generator(device).manual_seed(seed)
