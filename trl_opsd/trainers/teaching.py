# SPDX-License-Identifier: Apache-2.0
"""What a trainer needs to be its own teacher, whichever of TRL's trainers it extends."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..losses import OutputHead, Shape, Target, clip_gradient_products, fused_divergence
from ..model.checks import check_engine, check_model_config, check_vocabulary
from ..model.heads import attach_head_function, caps_logits, check_output_head, head_function, head_shape
from ..monitoring.diagnostics import log_values
from ..teacher.forwards import TeacherForward
from ..teacher.jobs import ScoringJob
from ..teacher.prompts import positions_from_mask
from ..teacher.scoring import ContextSharing, score_contexts
from ..teacher.states import TargetStates
from ..teacher.weights import Teacher
from .checks import check_capped_head, check_same_weights


class SelfTeaching:
    """Mixin in front of one of TRL's trainers: scores the model as the teacher, takes the loss inside its forward."""

    _sharing: ContextSharing | None = None
    _head_checked = False
    num_tokens: int | None = None  # rows of the head that are compared; None for all

    def prepare_model_to_teach(self) -> None:
        """Check engine and model, make its hidden states reachable, and learn their width; a collective.

        Raises:
            ValueError: names the engine's or the model's part that the loss cannot work with.
        """
        check_engine(self.accelerator.state, adapters=hasattr(self.model, "peft_config"))
        check_same_weights(self.model, self.accelerator)
        check_model_config(self.model.config)
        if caps_logits(self.model):
            check_capped_head(self.method, self.args)
        attach_head_function(self.model)
        head_rows, self.hidden_size = head_shape(self.model)
        check_vocabulary(self.model.config, head_rows, len(self.tokenizer))

    def _run_teacher(
        self,
        teacher: Teacher,
        jobs: list[ScoringJob],
        shape: tuple[int, int, int],
        *,
        with_direction: bool,
        result_device: torch.device | None = None,
    ) -> TargetStates:
        device = self.accelerator.device

        def max_over_ranks(count):
            return int(self.accelerator.gather(torch.tensor([count], device=device)).max())

        if caps_logits(self.model):
            check_capped_head(self.method, self.args, jobs)
        with teacher.active(), self.accelerator.autocast():
            if not self._head_checked:
                check_output_head(
                    self.model, self.model, torch.tensor([[self.tokenizer.eos_token_id] * 4], device=device)
                )
                self._head_checked = True
            return score_contexts(
                TeacherForward(self.model, self.model, teacher.observe_head, teacher.wants_head),
                jobs,
                shape=shape,
                dtype=torch.promote_types(self.model.dtype, torch.float32),
                device=device,
                pad_id=self.tokenizer.pad_token_id,
                tokens_per_forward=self.args.teacher_tokens_per_forward,
                with_direction=with_direction,
                result_device=result_device,
                max_over_ranks=max_over_ranks,
                sharing=self._sharing,
                progress=self.is_world_process_zero() and not self.args.disable_tqdm,
            )

    def distilled_length(self) -> int | None:
        """Tokens of a rollout that are distilled now, None for all; evaluation takes what training ends with."""
        args = self.args
        return args.distillation_length_at(self.state.global_step) if self.mode == "train" else args.distillation_length

    def divergence_of(
        self,
        states: torch.Tensor,
        head: OutputHead,
        target: Target,
        weights: torch.Tensor,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The method's loss now of the student's states (N, H), and numbers for the log: values (N,), and at the first step
        of a clipped loss `clip_products` (3,); see `fused_divergence`."""
        settings = {
            "token_weights": weights,
            "divergence": self.divergence,
            "num_tokens": self.num_tokens,
            "positions": positions,
        }
        numbers = {}
        if self.divergence.clip is not None and self.mode == "train" and self.state.global_step == 0:
            # At the strength that a growing target ends with: the clip cuts nothing of a target close to the student.
            last = replace(target, shape=self.method.shape(self.args, self.args.max_steps))
            numbers["clip_products"] = clip_gradient_products(states, head, last, **settings)
        loss, stats = fused_divergence(states, head, target, compiled=self.args.compile_loss, **settings)
        return loss, log_values(stats) | numbers

    def shape_now(self) -> Shape:
        """How the direction enters the target at this optimizer step."""
        return self.method.shape(self.args, self.state.global_step)

    def loss_in_forward(
        self, model: torch.nn.Module, ids: torch.Tensor, mask: torch.Tensor, function: Callable
    ) -> tuple[torch.Tensor, Any]:
        """Loss and numbers that `function` returns from the student's hidden states, inside the engine's forward.

        Args:
            model: the student, as the engine wraps it.
            ids: (B, S) token ids, padded on the left.
            mask: (B, S), 1 on tokens.
            function: see `heads.head_function`.
        """
        with head_function(self.model, function) as request:
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask))
        # The loss that came through the engine's forward, not the one inside it: output hooks may have wrapped it,
        # and rounded it (FSDP2's mixed precision): the value is the one inside.
        loss, numbers = output["loss"], request.result[1]
        return loss + (request.result[0] - loss).detach(), numbers

    def create_optimizer(self, *args, **kwargs):
        """The parent's optimizer without empty parameter groups (LoRA trains no bias or norm), on which DeepSpeed with
        torch 2.13 is reported to fail."""
        optimizer = super().create_optimizer(*args, **kwargs)
        optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return optimizer
