# SPDX-License-Identifier: Apache-2.0
"""The teacher with all that it is run with, whichever of TRL's trainers holds it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch

from ..checkpoints.state import load_head, save_head
from ..losses import OutputHead, likeliest_tokens, sampled_facts, token_overlap
from ..methods import Method
from ..model.checks import check_engine, check_model_config, check_vocabulary, num_positions
from ..model.heads import attach_head_function, caps_logits, check_output_head, head_shape, whole_head
from ..model.quantized import is_quantized, prepare_quantized
from ..monitoring.diagnostics import sum_decompositions
from ..rows.texts import Prompt
from ..teacher.contexts import Contexts, TeacherContext
from ..teacher.encoder import ContextEncoder
from ..teacher.forwards import TeacherForward
from ..teacher.jobs import ScoringJob
from ..teacher.prompts import EncodedContext, TeacherCollator
from ..teacher.scoring import ContextSharing, score_contexts
from ..teacher.states import TargetStates
from ..teacher.weights import Teacher
from .checks import check_capped_head, check_owners, check_same_weights, check_targets, named_place


class Scorer:
    """Encodes what the teacher reads, runs it over rollouts, and keeps the head that reads its hidden states.

    Args:
        model: the student, unwrapped; its forward is patched so that its hidden states can be reached.
        accelerator: of the trainer.
        method: whose contexts are scored.
        settings: `SelfDistillationSettings`.
        tokenizer: of the model.
        render_kwargs: what TRL passes to the chat template.
        fresh_adapter: its adapter was just made.
        keep_head: a target is read after later updates of the student.
        shares_contexts: a context that several rollouts have is read once.

    Raises:
        ValueError: names the engine's or the model's part that the loss cannot work with.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        accelerator: Any,
        method: Method,
        settings: Any,
        tokenizer: Any,
        *,
        render_kwargs: dict[str, Any] | None = None,
        fresh_adapter: bool = False,
        keep_head: bool = False,
        shares_contexts: bool = True,
    ):
        check_engine(accelerator.state, adapters=hasattr(model, "peft_config"), quantized=is_quantized(model))
        prepare_quantized(model)
        check_same_weights(model, accelerator)
        check_model_config(model.config)
        if caps_logits(model):
            check_capped_head(method, settings)
        attach_head_function(model)
        head_rows, self.hidden_size = head_shape(model)
        check_vocabulary(model.config, head_rows, len(tokenizer))
        self.model, self.accelerator, self.method, self.settings = model, accelerator, method, settings
        self.collator = TeacherCollator.from_settings(
            tokenizer, settings, render_kwargs, method.templates(settings), max_positions=num_positions(model.config)
        )
        # Rows of the head that are compared; None for all.
        self.num_tokens = len(tokenizer) if getattr(settings, "real_tokens_only", False) else None
        self._new_teacher = {"fresh_adapter": fresh_adapter, "keep_head": keep_head}
        self._sharing = ContextSharing() if shares_contexts else None
        self.encoder = ContextEncoder(self.collator)
        self._head_checked = False
        # One for each mode: an evaluation must not change a pending batch's.
        self.heads: dict[str, OutputHead | None] = {"train": None, "eval": None}

    def make_teacher(self) -> None:
        """Take the teacher's weights as the model has them now; before that nothing can be scored. A collective."""
        settings, kind = self.settings, self.settings.teacher_model_kind
        self.teacher = Teacher(kind, self.model, update_rate=settings.teacher_update_rate, **self._new_teacher)
        self._owners = {"teacher": self.teacher}
        for name in self.method.owners(settings):
            same = name == kind
            self._owners[name] = self.teacher if same else Teacher(name, self.model, **self._new_teacher)
        check_owners(self.method, settings, self.model)

    @property
    def first_values(self) -> Mapping[str, torch.Tensor]:
        """The trained parameters as they were at the start, which a checkpoint does not hold; empty where none reads them."""
        return next((owner.values for owner in self._owners.values() if owner.kind == "base"), {})

    # What the teacher reads

    def encode(self, prompt: Prompt, view: TeacherContext, place: str) -> EncodedContext:
        """Ids of a view of a row at `place`, which stands in front of its errors."""
        with named_place(place):
            return self.encoder.encode(prompt, view)

    # What it says

    def score(
        self,
        contexts: Sequence[Contexts],
        prompts: Sequence[tuple[Prompt, Prompt]],
        sequences: Sequence[list[int]],
        shape: tuple[int, int],
        *,
        mode: str,
        result_device: torch.device | None = None,
    ) -> tuple[TargetStates, list[bool]]:
        """What the teacher says of sequences; a collective.

        Args:
            contexts: its views of each; rows behind the first B are extras.
            prompts: of each, as the student and as the teacher's templates get it.
            sequences: token ids of each, at most D (extras: any number).
            shape: (B, D) of the target.
            mode: "train" or "eval", whose head is kept.
            result_device: of hidden states; None for the model's.

        Returns:
            The target, and of each sequence whether a text in one of its contexts was shortened.
        """
        check_targets(self.method, contexts, shape[0])
        jobs, shortened = self._jobs(contexts, prompts, sequences)
        target = self._empty(contexts, sequences, shape, result_device)
        for owner in self._owners:
            # On every rank alike; the target last, for a run forgets the head of the one before.
            for reads in [True] * self.method.reads_views + [False] * self._has_targets:
                self._run(self._owners[owner], jobs.pop((owner, reads), []), target, read=self._read if reads else None)
        if jobs:
            raise ValueError(
                f"{self.method.name}: contexts ask for {sorted(jobs)} (weights, read), but the method's owners="
                f"{self.method.owners(self.settings)}, has_target={self.method.has_target} and reads_views={self.method.reads_views} do not "
                "say so. Every rank has to know it: set them."
            )
        self.heads[mode] = self._owners[self.method.target_owner or "teacher"].head
        return target, shortened

    def _jobs(self, contexts, prompts, sequences) -> tuple[dict[tuple[str, bool], list[ScoringJob]], list[bool]]:
        jobs: dict[tuple[str, bool], list[ScoringJob]] = {}
        shortened = [False] * len(contexts)
        for row, views in enumerate(contexts):
            places = iter(range(len(views)))
            for view in views:
                prompt = prompts[row][view.template != "plain"]
                context = self.encode(prompt, view, f"generation batch row {row}")
                shortened[row] |= context.shortened
                reads = view.read is not None
                place = next(places) if reads else None
                job = ScoringJob(context.ids, sequences[row], row, view.anchor, view.direction, place)
                jobs.setdefault((view.weights, reads), []).append(job)
        return jobs, shortened

    @property
    def _has_targets(self) -> bool:
        return self.method.has_target or self.method.extras_have_target

    def _empty(self, contexts, sequences, shape, result_device) -> TargetStates:
        weights = [[view.read for view in views if view.read is not None] for views in contexts]
        return TargetStates.empty(
            (*shape, self.hidden_size if self.method.has_target else 0),
            torch.promote_types(self.model.dtype, torch.float32),
            result_device or self.accelerator.device,
            with_direction=self.method.shape(self.settings, 0).uses_direction,
            view_weights=weights if self.method.reads_views else None,
            num_view_tokens=max([shape[1], *map(len, sequences)]),
            extra_shape=(shape[0], max([1, *map(len, sequences[shape[0] :])]), self.hidden_size)
            if self.method.extras_have_target
            else None,
        )

    def _run(
        self,
        teacher: Teacher,
        jobs: Sequence[ScoringJob],
        target: Any,
        *,
        read: Callable[[torch.Tensor, OutputHead, torch.Tensor], torch.Tensor] | None = None,
        shares: bool = True,
    ) -> None:
        """Add what a teacher says of jobs to a target, `TargetStates` or alike; a collective."""
        device, tokenizer = self.accelerator.device, self.collator.tokenizer

        def max_over_ranks(count):
            return int(self.accelerator.gather(torch.tensor([count], device=device)).max())

        if caps_logits(self.model):
            check_capped_head(self.method, self.settings, jobs)
        with teacher.active(), self.accelerator.autocast():
            if not self._head_checked:
                check_output_head(self.model, self.model, torch.tensor([[tokenizer.eos_token_id] * 4], device=device))
                self._head_checked = True
            score_contexts(
                TeacherForward(self.model, self.model, teacher.observe_head, teacher.wants_head, read),
                jobs,
                target,
                device=device,
                pad_id=tokenizer.pad_token_id,
                tokens_per_forward=self.settings.teacher_tokens_per_forward,
                max_over_ranks=max_over_ranks,
                sharing=self._sharing if shares else None,
                progress=self.accelerator.is_main_process and not self.settings.disable_tqdm,
            )

    def _read(self, hidden: torch.Tensor, head: OutputHead, tokens: torch.Tensor) -> torch.Tensor:
        """Log-probability of each token (n,) and entropy (n, 2), at the temperature of the loss."""
        settings = {"temperature": self.settings.loss_temperature, "num_tokens": self.num_tokens}
        facts = sampled_facts(hidden, head, tokens.clamp(max=(self.num_tokens or len(head.weight)) - 1), **settings)
        return torch.stack([facts.log_prob, facts.student_entropy], dim=-1)

    def sum_signals(
        self,
        prompts: Sequence[tuple[Prompt, Prompt]],
        views: Mapping[str, Sequence[TeacherContext]],
        sequences: Sequence[list[int]],
    ) -> torch.Tensor:
        """Sums (7,) of `sum_decompositions` over sequences: what the solution alone explains of the teacher's signal.

        A collective that costs three views of them.

        Args:
            prompts: of each, as the student and as the teacher's templates get it.
            views: of each, with the problem ("teacher") and without it ("reference").
            sequences: token ids of each.
        """
        plain = [TeacherContext("plain", None)] * len(sequences)
        readers = [
            (Teacher("live", self.model), plain),
            *((self.teacher, views[name]) for name in ("teacher", "reference")),
        ]
        states = [self._states(teacher, own, prompts, sequences) for teacher, own in readers]
        with whole_head(self.model) as head:
            heads = [teacher.head or head for teacher, _ in readers]
            return sum_decompositions(
                *zip(states, heads, strict=True),
                temperature=self.settings.loss_temperature,
                num_tokens=self.num_tokens,
            )

    def overlaps(
        self, prompts: Sequence[Prompt], sequences: Sequence[list[int]], others: Sequence[Sequence[list[int]]], k: int
    ) -> list[list[float]]:
        """`token_overlap` of other sequences with what the student finds likeliest along each sequence; a collective.

        Args:
            prompts: of each sequence, as the student gets them.
            sequences: token ids of each.
            others: of each, those that it is compared with.
            k: so many of the likeliest tokens count.
        """
        plain = TeacherContext("plain", None)
        contexts = [
            self.encode(prompt, plain, f"generation batch row {row}").ids if own else []
            for row, (prompt, own) in enumerate(zip(prompts, others, strict=True))
        ]
        rows = [row for row, own in enumerate(others) if own and sequences[row]]
        found = _Overlaps([[torch.tensor(ids) for ids in own] for own in others], self.hidden_size)

        def read(hidden, head, tokens):  # ids of tokens are whole numbers below 2^24, which float32 holds
            return likeliest_tokens(hidden, head, k, num_tokens=self.num_tokens).float()

        jobs = [ScoringJob(contexts[row], sequences[row], row, 0.0, 0.0) for row in rows]
        # Apart: what tells whether contexts can be shared compares hidden states, and ids of tokens would drown them.
        self._run(Teacher("live", self.model), jobs, found, read=read, shares=False)
        return found.shares

    def _states(self, teacher, views, prompts, sequences) -> torch.Tensor:
        """Hidden states (n, H) of one view of all sequences, one behind the other."""
        jobs = []
        for row, (prompt, view, ids) in enumerate(zip(prompts, views, sequences, strict=True)):
            context = self.encode(prompt[view.template != "plain"], view, f"generation batch row {row}")
            jobs.append(ScoringJob(context.ids, ids, row, 1.0, 0.0))
        shape = (len(jobs), max(map(len, sequences), default=0), self.hidden_size)
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        target = TargetStates.empty(shape, dtype, self.accelerator.device)
        self._run(teacher, jobs, target)
        parts = [target.anchor[row, : len(job.rollout)] for row, job in enumerate(jobs)]
        return torch.cat(parts or [target.anchor.flatten(0, 1)])

    # Checkpoints

    def save(self, folder: str, *, with_head: bool) -> None:
        """Write the teacher, and the head of a target that is still to be read, into a checkpoint's folder."""
        self.teacher.save(folder)
        head = self.heads["train"]
        if head is not None and with_head:  # the same on every rank
            save_head(folder, {field.name: getattr(head, field.name) for field in fields(head)})

    def load(self, folder: str) -> None:
        """Read what `save` wrote."""
        self.teacher.load(folder)
        head = load_head(folder, self.accelerator.device)
        self.heads["train"] = None if head is None else OutputHead(**head)


class _Overlaps:
    """Takes the place of `TargetStates` where what is read of each position are its likeliest tokens.

    Args:
        others: of each row the sequences (M,) that are compared.
        hidden_size: H.
    """

    def __init__(self, others: Sequence[Sequence[torch.Tensor]], hidden_size: int):
        self.others, self.hidden_size, self.num_tokens = others, hidden_size, 0
        self.shares = [[0.0] * len(own) for own in others]

    def add(self, job: ScoringJob, states: torch.Tensor) -> None:
        """Compare a row's sequences with the tokens that stand behind its H hidden states."""
        likeliest = states[:, self.hidden_size :].long().cpu()
        self.shares[job.row] = [token_overlap(tokens, likeliest) for tokens in self.others[job.row]]
