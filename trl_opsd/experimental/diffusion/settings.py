# SPDX-License-Identifier: Apache-2.0
"""Settings of d-OPSD (arXiv 2606.18195): those of the authors' code, pinned by a test.

Their four scripts agree but for the clip, which is 0.04 on MATH, and the updates of a sample, 4 where memory allows and 8
elsewhere. Their file of defaults says `beta: 0` (forward KL) and `fixed_teacher: False`; every script sets 1 and true.
"""

import math
from dataclasses import dataclass
from typing import Any

from ...losses.divergences import DIVERGENCES
from ...settings.fields import option, require, teacher_kind

TEACHER_KINDS = ("base", "live")
# Of the adapter that the authors train, over weights in 4 bit: keyword arguments of `peft.LoraConfig`.
LORA = {
    "r": 128,
    "lora_alpha": 64,
    "lora_dropout": 0.05,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj"],
}


@dataclass
class DiffusionOPSDSettings:
    """How answers are sampled, what the teacher sees of them, and how the two are compared."""

    mask_token_id: int | None = option(None, "Token of a masked position. None takes the tokenizer's mask token.")
    eos_token_id: int | None = option(None, "Token that ends an answer. None takes the tokenizer's end token.")
    max_prompt_length: int = option(
        200, "Longest prompt in tokens. A longer one is refused, for its end is the question."
    )
    max_completion_length: int = option(256, "Tokens of an answer, its end filled up; the model denoises as many.")
    block_length: int = option(32, "Tokens of a block. Blocks are filled in one after another.")
    diffusion_steps: int = option(128, "Denoising steps of an answer, each of which fills in equally many tokens.")
    temperature: float = option(0.9, "Sampling temperature of a prompt's first answer, 0 for the likeliest tokens.")
    later_temperature: float = option(0.9, "Sampling temperature of its further answers.")
    num_samples: int = option(
        8, "Most answers of a prompt. Further ones are sampled until one is right; without any, its loss is 0."
    )
    retained_share: float = option(
        0.25,
        "Share, in [0, 1), of the positions of later blocks that the teacher sees as the finished answer has them.",
    )
    updates_per_sample: int = option(8, "Optimizer steps over which the states of one answer are dealt out, in order.")
    teacher_model_kind: str = teacher_kind("base")
    divergence: str = option("reverse_kl", "Divergence of a position; see docs/methods.md.")
    loss_top_k: int | None = option(20, "The teacher's likeliest tokens that are compared, renormalised; none for all.")
    clip_value: float | None = option(
        0.05, "Bound of each compared entry's term in nats (MATH: 0.04); none for no clip."
    )
    verifier: str = option("math", "Who says that an answer is right: `math`, `exact`, `choice` or `module:function`.")
    chat_template_kwargs: dict[str, Any] | None = option(None, "Arguments of the chat template.")

    @property
    def num_blocks(self) -> int:
        """Blocks of an answer."""
        return self.max_completion_length // self.block_length

    @property
    def steps_per_block(self) -> int:
        """Denoising steps of a block."""
        return self.diffusion_steps // self.num_blocks

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step fills in, and positions at which a state is compared."""
        return self.block_length // self.steps_per_block

    def check(self) -> None:
        """Raise a ValueError that names a field outside its range."""
        for name in (
            "max_prompt_length",
            "max_completion_length",
            "block_length",
            "diffusion_steps",
            "num_samples",
            "updates_per_sample",
        ):
            value = getattr(self, name)
            require(type(value) is int and value >= 1, self, name, "a whole number, 1 or more")
        for name in ("temperature", "later_temperature"):
            require(0 <= getattr(self, name) < math.inf, self, name, "0 or a number above")
        if self.num_samples > 1:
            require(self.later_temperature > 0, self, "later_temperature", "a number above 0, or num_samples to 1")
        require(0 <= self.retained_share < 1, self, "retained_share", "a share in [0, 1)")
        require(self.teacher_model_kind in TEACHER_KINDS, self, "teacher_model_kind", f"one of {TEACHER_KINDS}")
        require(self.divergence in DIVERGENCES, self, "divergence", f"one of {DIVERGENCES}")
        require(self.loss_top_k is None or self.loss_top_k >= 1, self, "loss_top_k", "1 or more, or None for all")
        bound = self.clip_value
        require(bound is None or 0 < bound < math.inf, self, "clip_value", "a number above 0, or None")
        self._check_schedule()

    def _check_schedule(self) -> None:
        length, block, steps = self.max_completion_length, self.block_length, self.diffusion_steps
        whole = length % block == 0 and length >= 2 * block
        wanted = (
            f"a divisor of max_completion_length={length} with two blocks or more, for the last block is not trained"
        )
        require(whole, self, "block_length", wanted)
        wanted = f"a multiple of the {self.num_blocks} blocks, at most {length}"
        require(steps % self.num_blocks == 0 and steps <= length, self, "diffusion_steps", wanted)
        if block % self.steps_per_block:
            raise ValueError(
                f"diffusion_steps={steps} gives a block of {block} tokens {self.steps_per_block} steps, which do not fill in "
                f"equally many. Set it to {self.num_blocks} times a divisor of block_length={block}."
            )
