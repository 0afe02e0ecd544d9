# SPDX-License-Identifier: Apache-2.0
"""What student, target and every view of the teacher say of each token of a rollout.

Inspection is offline and takes one rollout at a time, so all is dense and written from the definitions: the trainer's
fused loss is not used. Any `Method` can be inspected, since a method is a rule for contexts and a shape.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from ..losses import LinearShape
from ..methods import Method
from ..rows.texts import Prompt, fill_template, rewrite_last_turn
from ..rows.token_texts import token_texts
from ..teacher.contexts import Moment, Rollout, TeacherContext
from ..teacher.prompts import TeacherCollator
from .measures import decompose, extend_view, measure_direction, measure_loss
from .records import RolloutRecord, SampledRollout, ViewRecord
from .text import marker_flags
from .views import Views, pool_names

_ROWS = 64  # positions whose vocabulary is compared at once
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLAIN = TeacherContext("plain", None)


@dataclass(frozen=True)
class Inspector:
    """Models, method and settings of an inspection.

    Attributes:
        student: the model that is trained, with its weights of now.
        teacher: the frozen model; before training the same object.
        tokenizer: of both.
        method: what the teacher reads and how the target is shaped.
        settings: an `OPSDConfig` or a child.
        step: optimizer step that the shape is asked for (lambda may grow).
        num_top: likeliest tokens kept of every view.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    tokenizer: Any
    method: Method
    settings: Any
    step: int = 0
    num_top: int = 5

    @cached_property
    def _collator(self) -> TeacherCollator:
        templates = self.method.templates(self.settings)
        return TeacherCollator.from_settings(self.tokenizer, self.settings, templates=templates)

    def encode(self, rollout: Rollout, context: TeacherContext) -> list[int]:
        """Token ids of what a view reads before the rollout."""
        prompt = student_prompt(rollout.prompt, self.settings) if context.template == "plain" else rollout.prompt
        return self._collator.encode(prompt, context).ids

    def inspect_group(self, group: Sequence[SampledRollout]) -> list[RolloutRecord]:
        """Records of a prompt's rollouts; those that the method does not distil are left out.

        Args:
            group: the rollouts that the method's rule reads together; a single one where it reads no others.
        """
        moment = Moment(random.Random(f"{self.settings.seed}/{self.step}"), self.step)
        rollouts = self.method.noted([sampled.rollout for sampled in group], self.settings, moment)
        contexts = self.method.contexts(rollouts, self.settings, moment)
        pairs = [(sampled, views) for sampled, views in zip(group, contexts, strict=True) if views and sampled.ids]
        return [self._inspect(sampled.rollout, sampled.ids, views) for sampled, views in pairs]

    @torch.no_grad()
    def _inspect(self, rollout: Rollout, ids: list[int], contexts: Sequence[TeacherContext]) -> RolloutRecord:
        ids = ids[: self.settings.distillation_length_at(None)]
        views = self._score(rollout, ids, contexts)
        shape = self.method.shape(self.settings, self.step)
        strengths = [share * shape.strength for share in _STRENGTHS] if isinstance(shape, LinearShape) else []
        shapes = [("", shape), *((f"@{index}", LinearShape(strength)) for index, strength in enumerate(strengths))]
        rule = replace(self.settings.loss_divergence(), temperature=1.0)  # the views are tempered already
        shown = [ViewRecord("student", 0), ViewRecord("target", 0)]
        shown += [ViewRecord(name, count) for name, count in views.counts.items()]
        values: dict[str, list[float]] = {}
        for start in range(0, len(ids), _ROWS):
            part = views.rows(slice(start, start + _ROWS))
            tokens = torch.tensor(ids[start : start + _ROWS], device=part.student.device)
            log_q, log_p = part.student.log_softmax(-1), part.target(shape).log_softmax(-1)
            pools = [part.pools[name].log_softmax(-1) for name in views.counts]
            for record, log_probs in zip(shown, [log_q, log_p, *pools], strict=True):
                extend_view(record, log_probs, tokens, self.num_top)
            measured = measure_loss(log_q, log_p, tokens, rule)
            measured |= measure_direction(part, shapes, log_q, tokens, rule)
            if part.solution is not None:
                measured |= decompose(log_q, *(logits.log_softmax(-1) for logits in part.solution), tokens)
            for name, numbers in measured.items():
                values.setdefault(name, []).extend(numbers.tolist())
        texts = token_texts(self.tokenizer, ids)
        markers = marker_flags(texts)
        return RolloutRecord(rollout, ids, texts, markers, shown, values, strengths)

    def _score(self, rollout: Rollout, ids: list[int], contexts: Sequence[TeacherContext]) -> Views:
        """Logits of the student, of the method's views and, for the decomposition, of the solution's two views."""
        views = Views(self._logits(self.student, rollout, PLAIN, ids))
        solution = {}
        for name, context in zip(pool_names(contexts), contexts, strict=True):
            logits = self._logits(self.teacher, rollout, context, ids)
            views.add(name, context, logits)
            if rollout.solution is not None and context.slot == rollout.solution:
                solution[context.template] = logits
        if rollout.solution is None:
            return views
        shown = {context.template for context in contexts}
        for template in ("teacher", "reference"):
            if template not in solution:
                context = TeacherContext(template, rollout.solution)
                solution[template] = self._logits(self.teacher, rollout, context, ids)
                if template not in shown:
                    views.add(template, context, solution[template])
        return replace(views, solution=(solution["teacher"], solution["reference"]))

    def _logits(self, model: torch.nn.Module, rollout: Rollout, context: TeacherContext, ids: list[int]):
        """Tempered logits (T, V) that predict `ids`; head rows without a token are left out where the settings say so."""
        inputs = torch.tensor([[*self.encode(rollout, context), *ids]], device=model.device)
        logits = model(input_ids=inputs, logits_to_keep=len(ids) + 1).logits[0, :-1]
        size = len(self.tokenizer) if getattr(self.settings, "real_tokens_only", False) else None
        return logits[:, :size].float() / self.settings.loss_temperature


def student_prompt(prompt: Prompt, settings: Any) -> Prompt:
    """A dataset's prompt as the student reads it."""
    if settings.prompt_template is None:
        return prompt
    return rewrite_last_turn(prompt, lambda text: fill_template(settings.prompt_template, prompt=text))
