# SPDX-License-Identifier: Apache-2.0
"""Settings of SGSD (arXiv 2605.28791)."""

from dataclasses import dataclass

from ..rows.skill_bank import SkillBank, check_embeddings
from ..rows.texts import check_template
from .fields import option, require, teacher_kind

SKILL_PROMPT_TEMPLATE = """Advice from earlier problems that may or may not fit this one:

{skill}

The problem:

{prompt}"""


@dataclass
class SGSDSettings:
    """Defaults of the paper that differ from OPSD's, and what SGSD alone reads."""

    teacher_model_kind: str = teacher_kind("live")
    loss_temperature: float | None = option(1.0, "Divides both models' logits in the loss.")
    max_steps: int = option(200, "Optimizer steps.")
    reward_threshold: float = option(0.5, "A rollout is right if its reward is at least this.")
    max_skills: int = option(
        8, "Most skills of a row that are read, the best scored ones, or the first without scores."
    )
    skill_bank: str | None = option(
        None,
        "JSONL file of skills and mistakes (`skill`, `mistake`, perhaps `embedding`) in which those near to a problem are found, "
        "in place of the columns `skills` and `skill_scores`.",
    )
    skill_bank_refresh_steps: int = option(
        25, "Optimizer steps after which the bank is read again; a process of yours may rewrite it meanwhile."
    )
    skill_embedding_model: str | None = option(
        None,
        "Model of sentence-transformers, by name or folder, that compares problems with the bank; None compares the words that "
        "they share.",
    )
    support_clip: float = option(3.0, "Bound of a token's log-ratio where a teacher is judged, in nats, above 0.")
    support_threshold: float = option(0.05, "A teacher whose mean log-ratio is at most this has no opinion, 0 or more.")
    skill_prompt_template: str = option(
        SKILL_PROMPT_TEMPLATE, "The teacher's last user message; holds `{skill}` and `{prompt}`."
    )

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        require(self.max_skills >= 1, self, "max_skills", "1 or more")
        require(self.skill_bank_refresh_steps >= 1, self, "skill_bank_refresh_steps", "1 or more")
        self._check_bank()
        require(self.support_clip > 0, self, "support_clip", "a number above 0")
        require(self.support_threshold >= 0, self, "support_threshold", "0 or more")
        check_template("skill_prompt_template", self.skill_prompt_template, "{skill}", "{prompt}")

    def _check_bank(self) -> None:
        if self.skill_embedding_model is not None:
            check_embeddings(self.skill_embedding_model)
            require(
                self.skill_bank, self, "skill_bank", "a file: skill_embedding_model has nothing to embed without it"
            )
        if self.skill_bank is not None:
            try:
                SkillBank.read(self.skill_bank)
            except ValueError as error:
                raise ValueError(f"skill_bank: {error}") from error
