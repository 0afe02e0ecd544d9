# SPDX-License-Identifier: Apache-2.0
"""A method of self-distillation as one value: what its teacher reads, and how that becomes a loss.

A new method is a rule for contexts, at most one of three ways to a loss beside the plain divergence, and one `Method(...)`;
the trainer does not change. The ways, from the nearest to the plain one:

1. `token_weight` weighs the divergence, token by token.
2. `loss` replaces it by any function of numbers a token: of the sampled token's log-probability, of the divergence.
3. `advantages` replaces it by TRL's policy-gradient loss, whose advantage it gives token by token.

All three read the same facts. In `token_weight`, and in a `pointwise` loss, they are flat, (n,), a tile at a time; in the others
(B, D), views (K, B, D).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from ..losses import Divergence, Facts, Shape
from ..teacher.contexts import ContextRule, Moment, Rollout, TeacherContext

FactRule = Callable[["RowFacts", Any, Moment], torch.Tensor]


def no_shape(settings: Any, step: int) -> Shape:
    """The target is the anchor alone."""
    return Shape()


def _never(settings: Any) -> int:
    return 0


def _no_templates(settings: Any) -> Mapping[str, str]:
    return {}


def prompt_templates(*names: str) -> Callable[[Any], Mapping[str, str]]:
    """What `Method.templates` is where each template is the setting `NAME_prompt_template`."""
    return lambda settings: {name: getattr(settings, f"{name}_prompt_template") for name in names}


def _no_owners(settings: Any) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class RowFacts(Facts):
    """Facts of rollouts, each (B, D), and in `given` what is known beside them.

    `given` holds, (B, D): `mask` (nonzero where a token is trained on), `advantage` (TRL's), `reward` (NaN without one),
    `length` (tokens of the whole rollout), `engine_weight` (TRL's importance weight of trainer against vLLM; 1 where a run
    does not correct), `mark` (of `Method.marks`, where the method has some) and `old_log_prob`; and where views are read,
    (K, B, D): `view_log_probs`, `view_entropies`, `view_weights`.

    Attributes:
        extra: facts of the sequences beside the rollouts, (B, E), with `mask` and the views in their `given`; None without.
    """

    extra: "RowFacts | None" = None


class Extra(NamedTuple):
    """A sequence beside a rollout, which is trained on in the same step.

    Attributes:
        sequence: text, which the tokenizer encodes and ends, ids as they were sampled, or None for the rollout's own tokens.
        contexts: views of the teacher on it, which are read; where `Method.extra_term` has a divergence, also such
            as have an anchor.
        prompt: what the student reads before it, under `Method.extras_have_prompts`; None for the rollout's prompt.
    """

    sequence: str | list[int] | None
    contexts: tuple[TeacherContext, ...] = ()
    prompt: TeacherContext | None = None


class Term(NamedTuple):
    """A second term of the loss, on extras: the mean over their tokens of all of a step, times a weight.

    The mean is `loss_reduction`'s, as that over rollouts.

    Attributes:
        weight: from settings to the factor of the mean.
        divergence: from settings to what is measured between student and the target of extras, the sum of their views
            with an anchor; None where they have no target.
        loss: from (facts of extras, settings, moment) to terms (B, E) in place of the divergence, as `Method.loss`.
    """

    weight: Callable[[Any], float]
    divergence: Callable[[Any], Divergence] | None = None
    loss: FactRule | None = None


class Drafts(NamedTuple):
    """Texts that the model writes for a rollout, one after another, before contexts are made.

    Attributes:
        asks: from (rollout, settings, moment) to the context that the model answers next, as `Method.asks`. It is asked again, with
            one more of `Rollout.drafts`, until it gives None for every rollout of all ranks.
        top_k: from settings to k of `Draft.overlap`. Where it is given, drafts are answers to the rollout's prompt: the reward
            functions are asked about them, and each is compared with the student's k likeliest tokens.
        sampling: from settings to the `temperature` and `top_p` that they are drawn with; None for those of rollouts.
    """

    asks: Callable[[Rollout, Any, Moment], TeacherContext | None]
    top_k: Callable[[Any], int] | None = None
    sampling: Callable[[Any], Mapping[str, float]] | None = None


class Seen(NamedTuple):
    """A generation batch of all ranks, as `Method.remember` sees it.

    Attributes:
        rollouts: in the order of the batch.
        view_log_probs, view_entropies: of each rollout (K, length) float64, of its views that are read; empty without any.
    """

    rollouts: Sequence[Rollout]
    view_log_probs: Sequence[torch.Tensor]
    view_entropies: Sequence[torch.Tensor]


@dataclass(frozen=True)
class Method:
    """A method of on-policy self-distillation.

    Attributes:
        name: as the paper writes it.
        contexts: from (rollouts of one prompt, settings, [`Moment`]) to the teacher's contexts of each; a rollout
            with none, best an [`Unused`] with the reason, is not trained on.
        shape: from (settings, optimizer step) to how the direction enters the target.
        needs_solution: every row must have a reference solution.
        contexts_from_rows: `contexts` reads of a rollout its row alone (prompt, solution, columns), and not the other rollouts of
            its prompt. The views are then encoded while rollouts are sampled.
        needs_group: `contexts` reads the other rollouts of the prompt and their rewards.
        needs_reward: `contexts` reads rewards, so there must be some.
        label: names the kind of a group from (rollouts, settings); the share of each kind is logged.
        paper: title, arXiv id and citation, for the model card.
        token_weight: from (facts of some positions, settings, moment) to the weight (n,), of any sign, of the divergence.
        loss: from (facts, settings, moment) to what is minimised: terms (B, D), averaged as `loss_reduction` says, or one
            number a rollout (B,), averaged over rollouts. Its gradient flows through `log_prob` and, where the method has a
            target, through `divergence` (under a clip `clipped_divergence`).
        pointwise: a token's `loss` depends on its own facts alone. It then gets them as `token_weight` does, flat, (n,), a tile
            at a time, gives terms (n,), and the student is projected once, not twice.
        averages_all: a loss of one number a rollout is averaged over all rollouts, those without a context too.
        advantages: from (facts, settings, moment) to the advantages (B, D) of TRL's policy-gradient loss; the facts'
            `advantage` is TRL's own times `reward_weight`.
        has_target: some context has an anchor, so that there is a divergence; False where views are only read.
        reads_views: some context is read. The facts then hold `view_log_probs`, `view_entropies` and `view_weights`
            (K, B, D), whose weight is 0 where a rollout has fewer views.
        reads_old: `old_log_prob` is that of the policy that sampled, not the student's own at the first step on a batch.
        owners: from settings to whose weights contexts ask for beside "teacher": "base", "live".
        templates: from settings to the prompt templates of the method's own, by the name that contexts use.
        decomposition_steps: from settings to the optimizer steps between two measurements of how much of the teacher's signal
            the solution alone explains; 0 for none.
        columns: of the dataset, that `Rollout.columns` holds.
        needs_columns: those of them that a dataset must have, or a function from settings to these.
        ignored_tokens: from (tokenizer, settings) to the ids of tokens that are never trained on.
        remember: from (memory, [`Seen`], settings) to the memory from the next loss on, as JSON; called once a
            generation batch of training, on every rank alike, saved in checkpoints.
        notes: from (this rank's rollouts, settings, moment) to what `Rollout.note` holds of each, for instance what a function of
            the user's says of it; called once a generation batch, before all other rules and once rewards are known. It must
            be the same wherever the rollout stands, and picklable.
        asks: from (rollout, settings) to the context that the model answers before contexts are made, or None;
            `Rollout.written` holds the answer. The weights that the context names, "teacher" or "live", write it, under vLLM the
            student's.
        drafts: further texts that the model writes, after it has answered what `asks` asks; `Rollout.drafts` holds them.
        extras: from (rollouts of one prompt, settings, moment) to one sequence beside each rollout, or None.
        extras_have_prompts: extras may stand behind a prompt of their own. Rows then keep their micro-batch and its width.
        extra_term: a second term of the loss, which is of extras alone; then `facts.extra` of the other rules is None.
        target_owner: whose weights alone read views with an anchor, "teacher", "base" or "live", so that one head reads the
            target even where the head trains; None where several may.
        target_is_reference: the target is no teacher, but the model that the student is to stay near to. The log's
            `divergence` and `target_entropy` are then those of the views that are read, and `reference_divergence` is its own.
        marks: from (rollouts of one prompt, settings, moment) to a number for each rollout, or to one for each of its tokens,
            which the facts' `mark` holds; `Rollout.token_ends` is then known.
        report: from memory to numbers for the log, by a name in small letters; asked after `remember`.
        own_prompts: a row may bring what the view `teacher` reads, see `PrivilegedText`: where no other view has to differ from
            it in the template alone.
        solution_shares: its views show `Rollout.shown_solution`.
        reference: from a rollout to what all other rules take for its solution; None for the row's own.
        inferred: what of the formula no source states, in a sentence; told at the start, and in the card. For pages of
            `experimental`.
    """

    name: str
    contexts: ContextRule
    shape: Callable[[Any, int], Shape] = no_shape
    needs_solution: bool = True
    contexts_from_rows: bool = False
    needs_group: bool = False
    needs_reward: bool = False
    label: Callable[[Sequence[Rollout], Any], str] | None = None
    paper: Mapping[str, str] = field(default_factory=dict)
    token_weight: FactRule | None = None
    loss: FactRule | None = None
    pointwise: bool = False
    averages_all: bool = False
    advantages: FactRule | None = None
    has_target: bool = True
    reads_views: bool = False
    reads_old: bool = False
    owners: Callable[[Any], tuple[str, ...]] = _no_owners
    templates: Callable[[Any], Mapping[str, str]] = _no_templates
    decomposition_steps: Callable[[Any], int] = _never
    columns: tuple[str, ...] = ()
    needs_columns: tuple[str, ...] | Callable[[Any], tuple[str, ...]] = ()
    ignored_tokens: Callable[[Any, Any], Collection[int]] | None = None
    remember: Callable[[Mapping[str, Any], Seen, Any], Mapping[str, Any]] | None = None
    notes: Callable[[Sequence[Rollout], Any, Moment], list[Any]] | None = None
    asks: Callable[[Rollout, Any], TeacherContext | None] | None = None
    drafts: Drafts | None = None
    extras: Callable[[Sequence[Rollout], Any, Moment], list[Extra | None]] | None = None
    extras_have_prompts: bool = False
    extra_term: Term | None = None
    target_owner: str | None = None
    target_is_reference: bool = False
    marks: Callable[[Sequence[Rollout], Any, Moment], list[float | Sequence[float]]] | None = None
    report: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None
    own_prompts: bool = False
    solution_shares: bool = False
    reference: Callable[[Rollout], str | None] | None = None
    inferred: str = ""

    def __post_init__(self):
        ways = [name for name in ("token_weight", "loss", "advantages") if getattr(self, name) is not None]
        if len(ways) > 1 and ways != ["loss", "advantages"]:
            raise ValueError(f"{self.name}: {' and '.join(ways)} are given; a method has one way to its loss.")
        if self.pointwise and (ways != ["loss"] or self.extras is not None):
            raise ValueError(f"{self.name}: pointwise is for a loss alone, without extras.")
        if not self.has_target and not {"loss", "advantages"} & set(ways):
            raise ValueError(f"{self.name}: without a target there is no divergence; give a loss or advantages.")
        if self.extras_have_prompts and self.extras is None:
            raise ValueError(f"{self.name}: extras_have_prompts needs extras.")
        term = self.extra_term
        if term is not None and (self.extras is None or term[1:] == (None, None)):
            raise ValueError(f"{self.name}: extra_term needs extras, and a divergence or a loss.")

    @property
    def extras_have_target(self) -> bool:
        """Whether views of extras have an anchor."""
        return self.extra_term is not None and self.extra_term.divergence is not None

    def needed_columns(self, settings: Any) -> tuple[str, ...]:
        """Columns that a dataset must have under the settings."""
        return self.needs_columns(settings) if callable(self.needs_columns) else self.needs_columns

    def noted(self, rollouts: Sequence[Rollout], settings: Any, moment: Moment) -> list[Rollout]:
        """The rollouts with their `reference` and what `notes` says of them."""
        if self.reference is not None:
            rollouts = [replace(rollout, solution=self.reference(rollout)) for rollout in rollouts]
        if self.notes is None:
            return list(rollouts)
        notes = self.notes(rollouts, settings, moment)
        return [replace(rollout, note=note) for rollout, note in zip(rollouts, notes, strict=True)]
