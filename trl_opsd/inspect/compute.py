# SPDX-License-Identifier: Apache-2.0
"""What student, target and every view of the teacher say of each token of a rollout, and what the method makes of it.

Inspection is offline and takes one rollout at a time, so all is dense and written from the definitions: the trainer's
fused loss is not used. Any `Method` can be inspected: its rules are asked, and their results shown token by token.
"""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from ..losses import Divergence, LinearShape, view_shares
from ..methods import Extra, Method
from ..methods.privileged import PrivilegedText
from ..rows.checks import without_special_tokens
from ..rows.texts import Prompt, fill_template, is_missing, rewrite_last_turn
from ..rows.token_texts import text_ends, token_texts
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Written
from ..teacher.prompts import TeacherCollator
from .drafts import with_drafts
from .measures import decompose, extend_view, measure_direction, measure_loss
from .records import RolloutRecord, SampledRollout, ViewRecord
from .rules import apply_rule, apply_term, group_advantages, no_facts, row_facts
from .sampling import sample
from .text import marker_flags
from .views import Views, pool_names

_ROWS = 64  # positions whose vocabulary is compared at once
_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PLAIN = TeacherContext("plain", None)


@dataclass(frozen=True)
class _Asked:
    """A rollout with what the method says of it."""

    rollout: Rollout
    ids: list[int]
    contexts: Contexts
    extra: Extra | None
    mark: float | Sequence[float] | None
    advantage: float


@dataclass(frozen=True)
class Inspector:
    """Models, method and settings of an inspection.

    Attributes:
        student: the model that is trained, with its weights of now.
        teacher: the initial weights; before training the same object.
        tokenizer: of both.
        method: what the teacher reads, how the target is shaped, and which way it takes to a loss.
        settings: an `OPSDConfig` or a child.
        step: optimizer step that the shape is asked for (lambda may grow).
        num_top: likeliest tokens kept of every view.
        memory: what the method remembers, see `Method.remember`; empty as before the first batch.
        average: the teacher's weights where they are a moving average; None takes the initial ones in their place.
        unused: why rollouts had no view, counted over the groups that were inspected.
    """

    student: torch.nn.Module
    teacher: torch.nn.Module
    tokenizer: Any
    method: Method
    settings: Any
    step: int = 0
    num_top: int = 5
    memory: Mapping[str, Any] = field(default_factory=dict)
    average: torch.nn.Module | None = None
    unused: Counter = field(default_factory=Counter)

    @cached_property
    def _collator(self) -> TeacherCollator:
        templates = self.method.templates(self.settings)
        return TeacherCollator.from_settings(self.tokenizer, self.settings, templates=templates)

    @cached_property
    def privileged(self) -> PrivilegedText:
        """What rows bring for the teacher to read."""
        return PrivilegedText(self.method, self.settings)

    def encode(self, rollout: Rollout, context: TeacherContext) -> list[int]:
        """Token ids of what a view reads before the rollout."""
        prompt = student_prompt(rollout.prompt, self.settings) if context.template == "plain" else rollout.prompt
        return self._collator.encode(prompt, context).ids

    def inspect_group(self, group: Sequence[SampledRollout]) -> list[RolloutRecord]:
        """Records of a prompt's rollouts, a sequence beside a rollout behind it; those that no view reads are left out.

        Args:
            group: the rollouts that the method's rule reads together; a single one where it reads no others.
        """
        records: list[RolloutRecord] = []
        for asked in self._ask(group, self._moment()):
            if asked.ids and (asked.contexts or asked.extra is not None):
                records += self._inspect(asked)
            else:
                self.unused[getattr(asked.contexts, "reason", "no view")] += 1
        return records

    def _moment(self) -> Moment:
        return Moment(random.Random(f"{self.settings.seed}/{self.step}"), self.step, self.memory)

    def _ask(self, group: Sequence[SampledRollout], moment: Moment) -> list[_Asked]:
        """Everything that the method says of a group, in the order of training."""
        method, settings = self.method, self.settings
        rollouts = method.noted([self._known(sampled) for sampled in group], settings, moment)
        tokens, complete = self._collator.special_tokens, self.privileged
        rollouts, _ = complete.with_own_prompts(rollouts, self.encode, tokens)
        rollouts = [self._answered(rollout) for rollout in rollouts]
        rollouts = [
            self._drafted(rollout, sampled.ids, moment) for rollout, sampled in zip(rollouts, group, strict=True)
        ]
        contexts = method.contexts(rollouts, settings, moment)
        contexts = [complete.views(views, rollout) for views, rollout in zip(contexts, rollouts, strict=True)]
        nothing = [None] * len(rollouts)
        extras = nothing if method.extras is None else method.extras(rollouts, settings, moment)
        extras = [complete.extra(extra, rollout) for extra, rollout in zip(extras, rollouts, strict=True)]
        marks = nothing if method.marks is None else method.marks(rollouts, settings, moment)
        advantages = group_advantages([rollout.reward for rollout in rollouts], settings)
        ids = [sampled.ids for sampled in group]
        return [_Asked(*parts) for parts in zip(rollouts, ids, contexts, extras, marks, advantages, strict=True)]

    def _known(self, sampled: SampledRollout) -> Rollout:
        """The rollout with what training knows of it."""
        ends = () if self.method.marks is None else text_ends(self.tokenizer, sampled.ids)
        share = self.settings.solution_share_at(self.step)
        return replace(sampled.rollout, token_ends=ends, solution_share=share)

    def _answered(self, rollout: Rollout) -> Rollout:
        """The rollout with what the model writes for it, where the method asks, by the weights that the context names."""
        if self.method.asks is None or rollout.written is not None:
            return rollout
        request = self.method.asks(rollout, self.settings)
        return rollout if request is None else replace(rollout, written=self._write(rollout, request, self.settings))

    def _drafted(self, rollout: Rollout, ids: list[int], moment: Moment) -> Rollout:
        """The rollout with its drafts, where the method has some."""

        @torch.no_grad()
        def likeliest(k: int) -> torch.Tensor:
            logits = self._logits(self.student, rollout, PLAIN, ids)
            return logits.topk(min(k, logits.size(-1))).indices.cpu()

        return with_drafts(self.method, self.settings, rollout, moment, self._write, likeliest)

    def _write(self, rollout: Rollout, request: TeacherContext, settings: Any) -> Written:
        """What the model answers to a context, by the weights that it names."""
        request, tokenizer = self.privileged.view(request, rollout), self.tokenizer
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed + len(rollout.drafts))
            (ids,) = sample(self._reader(request.weights), self.encode(rollout, request), 1, settings, tokenizer)
        text = without_special_tokens(tokenizer.decode(ids, skip_special_tokens=True), self._collator.special_tokens)
        return Written(text, ids)

    def _inspect(self, asked: _Asked) -> list[RolloutRecord]:
        """The record of a rollout, and that of the sequence beside it."""
        ids = asked.ids[: self.settings.distillation_length_at(None)]
        record = self._record(asked.rollout, ids, asked.contexts)
        beside, extra = self._extra_record(asked), None
        if beside is not None:
            extra = row_facts(beside, {"mask": 1.0})
        elif self.method.extras is not None:
            extra = no_facts()
        mask = self._mask(ids)
        term, extra_facts = self.method.extra_term, extra
        facts = row_facts(record, self._given(asked, mask, len(ids)), None if term is not None else extra)
        values, extra_values, number = apply_rule(self.method, self.settings, self._moment(), facts)
        _keep(record, values)
        if not all(mask):
            record.values["trained"] = mask
        if "mark" in facts.given:
            record.values["mark"] = facts.given["mark"][0].tolist()
        if self.method.advantages is not None or self.settings.reward_weight:
            record.numbers["advantage of TRL"] = asked.advantage
        if number is not None:
            record.numbers["loss of the rollout"] = number
        if beside is None:
            return [record]
        if term is not None:
            extra_values = apply_term(term, self.settings, self._moment(), extra_facts)
        _keep(beside, extra_values)
        return [record, beside]

    def _mask(self, ids: list[int]) -> list[float]:
        """1 on the tokens that are trained on."""
        ignored = self.method.ignored_tokens
        left_out = set() if ignored is None else set(ignored(self.tokenizer, self.settings))
        skipped = self.settings.num_loss_tokens_to_skip
        return [float(place >= skipped and token not in left_out) for place, token in enumerate(ids)]

    def _given(self, asked: _Asked, mask: list[float], length: int) -> dict[str, Any]:
        reward = asked.rollout.reward
        given = {
            "mask": mask,
            "advantage": asked.advantage,
            "reward": float("nan") if reward is None else reward,
            "length": len(asked.ids),
        }
        if asked.mark is not None:
            mark = asked.mark
            given["mark"] = mark if isinstance(mark, float | int) else [*mark, *[0.0] * length][:length]
        return given

    def _extra_record(self, asked: _Asked) -> RolloutRecord | None:
        if asked.extra is None:
            return None
        ids = asked.extra.sequence
        if isinstance(ids, str):
            ids = [*self.tokenizer(ids, add_special_tokens=False)["input_ids"], self.tokenizer.eos_token_id]
        ids = ids[: self.settings.max_completion_length]
        term = self.method.extra_term
        rule = None if term is None or term.divergence is None else term.divergence(self.settings)
        rollout = replace(asked.rollout, reward=None)
        record = self._record(rollout, ids, asked.extra.contexts, rule, decomposes=False)
        record.is_extra = True
        return record

    @torch.no_grad()
    def _record(
        self,
        rollout: Rollout,
        ids: list[int],
        contexts: Contexts,
        rule: Divergence | None = None,
        *,
        decomposes: bool = True,
    ) -> RolloutRecord:
        """What student, target and views say of each token of a sequence; the divergence is the method's own without `rule`."""
        rule = replace(rule or self.settings.loss_divergence(), temperature=1.0)  # the views are tempered already
        views = self._score(rollout, ids, contexts, decomposes=decomposes)
        shape = self.method.shape(self.settings, self.step)
        strengths = [share * shape.strength for share in _STRENGTHS] if isinstance(shape, LinearShape) else []
        shapes = [("", shape), *((f"@{index}", LinearShape(strength)) for index, strength in enumerate(strengths))]
        shown = [ViewRecord("student", 0), *([ViewRecord("target", 0)] if views.anchor is not None else [])]
        shown += [
            ViewRecord(name, count, weight=views.weights.get(name), reads=views.reads.get(name, ""))
            for name, count in views.counts.items()
        ]
        values: dict[str, list[float]] = {}
        for start in range(0, len(ids), _ROWS):
            part = views.rows(slice(start, start + _ROWS))
            tokens = torch.tensor(ids[start : start + _ROWS], device=part.student.device)
            for name, numbers in self._measure(part, shapes, shown, tokens, rule).items():
                values.setdefault(name, []).extend(numbers.tolist())
        texts = token_texts(self.tokenizer, ids)
        record = RolloutRecord(rollout, ids, texts, marker_flags(texts), shown, values, strengths)
        _keep(record, _ratios(record))
        return record

    def _measure(
        self, part: Views, shapes: list, shown: list[ViewRecord], tokens: torch.Tensor, rule: Divergence
    ) -> dict:
        """Numbers (n,) of some positions; those of the views are appended to their records."""
        log_q = part.student.log_softmax(-1)
        distributions = [log_q, *(part.pools[name].log_softmax(-1) for name in part.counts)]
        measured = {}
        if part.anchor is not None:
            log_p = part.target(shapes[0][1]).log_softmax(-1)
            distributions.insert(1, log_p)
            measured |= measure_loss(log_q, log_p, tokens, rule)
            measured |= measure_direction(part, shapes, log_q, tokens, rule)
            if rule.entropy_top_k is not None:
                top = log_p.topk(min(rule.entropy_top_k, log_p.size(-1))).values.log_softmax(-1)
                measured["target_top_entropy"] = -(top.exp() * top).sum(-1)
        for record, log_probs in zip(shown, distributions, strict=True):
            extend_view(record, log_probs, tokens, self.num_top)
        if part.solution is not None:
            measured |= decompose(log_q, *(logits.log_softmax(-1) for logits in part.solution), tokens)
        return measured

    def _score(self, rollout: Rollout, ids: list[int], contexts: Contexts, *, decomposes: bool) -> Views:
        """Logits of the student, of the method's views and, for the decomposition, of the solution's two views."""
        views = Views(self._logits(self.student, rollout, PLAIN, ids))
        solution = {}
        for name, context in zip(pool_names(contexts), contexts, strict=True):
            logits = self._logits(self._reader(context.weights), rollout, context, ids)
            views.add(name, context, logits)
            views.reads.setdefault(name, self.tokenizer.decode(self.encode(rollout, context)))
            if rollout.solution is not None and context.slot == rollout.shown_solution and context.weights == "teacher":
                solution[context.template] = logits
        decomposes = decomposes and self.settings.solution_control != "shortest_rollout"  # which is no row's solution
        if is_missing(rollout.solution) or rollout.teacher_prompt is not None or not decomposes:
            return views
        shown = {context.template for context in contexts}
        for template in ("teacher", "reference"):
            if template not in solution:
                context = self.privileged.view(TeacherContext(template, rollout.shown_solution), rollout)
                solution[template] = self._logits(self._reader("teacher"), rollout, context, ids)
                if template not in shown:
                    views.add(template, context, solution[template])
        return replace(views, solution=(solution["teacher"], solution["reference"]))

    def _reader(self, weights: str) -> torch.nn.Module:
        """The model whose weights read a view."""
        kind = self.settings.teacher_model_kind if weights == "teacher" else weights
        if kind == "live":
            return self.student
        return self.average if kind == "ema" and self.average is not None else self.teacher

    def _logits(self, model: torch.nn.Module, rollout: Rollout, context: TeacherContext, ids: list[int]):
        """Tempered logits (T, V) that predict `ids`; head rows without a token are left out where the settings say so."""
        inputs = torch.tensor([[*self.encode(rollout, context), *ids]], device=model.device)
        logits = model(input_ids=inputs, logits_to_keep=len(ids) + 1).logits[0, :-1]
        size = len(self.tokenizer) if getattr(self.settings, "real_tokens_only", False) else None
        return logits[:, :size].float() / self.settings.loss_temperature


def _ratios(record: RolloutRecord) -> dict[str, torch.Tensor]:
    """Of the views that are read, `ratio@k`: log p_k - log q of the sampled token; and their mean, by their weights."""
    read = [view for view in record.views if view.weight is not None]
    if not read:
        return {}
    own = torch.tensor(record.views[0].log_prob)
    ratios = [torch.tensor(view.log_prob) - own for view in read]
    values = {f"ratio@{place}": ratio for place, ratio in enumerate(ratios)}
    shares = view_shares(torch.tensor([view.weight for view in read]))
    return values | {"sampled_divergence": -(shares[:, None] * torch.stack(ratios)).sum(0)}


def _keep(record: RolloutRecord, values: Mapping[str, torch.Tensor]) -> None:
    record.values |= {name: numbers.tolist() for name, numbers in values.items()}


def student_prompt(prompt: Prompt, settings: Any) -> Prompt:
    """A dataset's prompt as the student reads it."""
    if settings.prompt_template is None:
        return prompt
    return rewrite_last_turn(prompt, lambda text: fill_template(settings.prompt_template, prompt=text))
