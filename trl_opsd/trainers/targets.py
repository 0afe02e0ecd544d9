# SPDX-License-Identifier: Apache-2.0
"""From a generation batch's rows and rollouts to the columns that its loss reads."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from accelerate.utils import gather_object

from ..methods import Extra, Seen
from ..methods.privileged import PrivilegedText
from ..rows.checks import check_rows, without_special_tokens
from ..rows.texts import OWN_PROMPT, Prompt, as_text_turns, is_missing, rewrite_last_turn
from ..rows.token_texts import text_ends
from ..teacher.contexts import Contexts, Moment, Rollout, TeacherContext, Written
from ..teacher.prompts import left_pad
from ..teacher.states import TargetStates, waits_in_host_memory
from .drafts import DraftWriter
from .groups import GroupReader
from .rollout_log import RolloutCounts, count_rollouts
from .scorer import Scorer
from .tools import observation_of, turns_of, with_report

_PLAIN = TeacherContext("plain", None)


@dataclass
class RolloutBatch:
    """This rank's part of a generation batch, as far as it is known.

    Attributes:
        rows: as they are sampled from.
        prompts: of the dataset, before `prompt_template`.
        mode: "train" or "eval".
        ids: of each rollout every token behind its prompt.
        texts: of the rollouts.
        counts: what the log says of them, counted in a thread while the teacher scores.
        rollouts: as the method reads them.
        contexts, extras: of each rollout.
        marks: of each rollout or of its tokens; empty where the method has none.
        target: what the teacher says of them, None until it is scored.
        shortened: of each rollout, whether a text in its contexts was.
        extra_ids: tokens of the extras; empty where the method has none.
    """

    rows: list[dict]
    prompts: list[Prompt]
    mode: str
    ids: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    counts: Future[RolloutCounts] | None = None
    rollouts: list[Rollout] = field(default_factory=list)
    contexts: list[Contexts] = field(default_factory=list)
    extras: list[Extra | None] = field(default_factory=list)
    marks: list[float | Sequence[float]] = field(default_factory=list)
    target: TargetStates | None = None
    shortened: list[bool] = field(default_factory=list)
    extra_ids: list[list[int]] = field(default_factory=list)


class TargetMaker:
    """Asks the method, and the teacher, about the rollouts of a generation batch.

    Args:
        scorer: the teacher.
        groups: of the same method.
        settings: of the run.
        tokenizer: of the model.
        longest: tokens that a rollout, and an extra, may have.
        write: answers of the model to prompts, see `RolloutTrainer.write_answers`.
        reward: rewards of such answers, see `DraftWriter`.
        log: takes numbers that are the same on every rank.
        privileged: what rows bring, for the same method.
        rows_are_checked: the rows of training were checked before it, see `check_prompts`.
    """

    def __init__(
        self,
        scorer: Scorer,
        groups: GroupReader,
        settings: Any,
        tokenizer: Any,
        longest: int,
        write: Callable[[list[list[int]], Mapping[str, float]], list[list[int]]],
        reward: Callable[[list[dict], list[str], list[list[int]]], list[float | None]],
        log: Callable[[dict[str, float]], None],
        privileged: PrivilegedText,
        *,
        rows_are_checked: bool = False,
    ):
        self.scorer, self.groups, self.settings, self.tokenizer = scorer, groups, settings, tokenizer
        self.method, self.longest, self.write, self.log = scorer.method, longest, write, log
        self.privileged, self.rows_are_checked = privileged, rows_are_checked
        self.drafts = DraftWriter(scorer, settings, reward, log)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="count-rollouts")
        self._told = False  # that vLLM does not write with the teacher's weights

    def prepare(self, rows: list[dict], mode: str, moment: Moment) -> RolloutBatch:
        """Check rows and rewrite their prompts before they are sampled from, and begin to encode the contexts that are known.

        Raises:
            ValueError: names the row that cannot be read.
        """
        name, collator = "generation batch", self.scorer.collator
        tokens = collator.special_tokens
        check_rows(rows, name, needs_solution=self.method.needs_solution, special_tokens=tokens)
        for index, row in enumerate(rows):
            self.privileged.check_row(row, f"{name} row {index}")
        rows = [{**row, "prompt": as_text_turns(row["prompt"])} for row in rows]
        prompts = [row["prompt"] for row in rows]
        rows = [{**row, "prompt": collator.as_sampled(row["prompt"])} for row in rows]
        self.scorer.encoder.forget()
        if mode != "train" or not self.rows_are_checked:
            for index, row in enumerate(rows):  # here an error has the row's place
                self.scorer.encode(row["prompt"], _PLAIN, f"{name} row {index}: `prompt`")
        batch = RolloutBatch(rows, prompts, mode)
        if self.method.contexts_from_rows and self.settings.teacher_prompt_function is None:
            self.scorer.encoder.begin(lambda: self._foreseen(batch, moment))
        return batch

    def _foreseen(self, batch: RolloutBatch, moment: Moment) -> Iterator[tuple[Prompt, TeacherContext]]:
        """Prompt and view of every context, as `read` will have them once rollouts are sampled."""
        share = self.settings.solution_share_at(moment.step if batch.mode == "train" else None)
        for row, prompt in zip(batch.rows, batch.prompts, strict=True):
            rollout = Rollout(
                prompt, row.get("solution"), "", columns=self.privileged.columns_of(row), solution_share=share
            )
            (rollout,) = self.method.noted([rollout], self.settings, moment)
            (views,) = self.method.contexts([rollout], self.settings, moment)
            for view in self.privileged.views(views, rollout):
                yield (row["prompt"] if view.template == "plain" else prompt), view

    def observed(self, batch: RolloutBatch, prompts: Sequence[Prompt]) -> None:
        """Put behind the prompts what environments told the student before its first turn, so that the teacher reads it too.

        Args:
            batch: prepared.
            prompts: as they were sampled from.
        """
        for index, (row, sampled) in enumerate(zip(batch.rows, prompts, strict=True)):
            told = observation_of(row["prompt"], sampled)
            if told:
                batch.rows[index] = {
                    **row,
                    "prompt": rewrite_last_turn(row["prompt"], lambda text, told=told: text + told),
                }
                batch.prompts[index] = rewrite_last_turn(batch.prompts[index], lambda text, told=told: text + told)

    def sampled(
        self,
        batch: RolloutBatch,
        rollout_ids: list[list[int]],
        end_token_ids: set[int],
        completions: Sequence[Any] | None = None,
        texts: list[str] | None = None,
    ) -> None:
        """Take in what was sampled, as rollouts without a reward so far.

        Args:
            batch: prepared.
            rollout_ids: of each every token behind its prompt.
            end_token_ids: one of which ends a rollout that is whole.
            completions: with tools what TRL makes of the rollouts, messages of the model and of tools.
            texts: of the rollouts, where TRL has decoded them.
        """
        turns = [()] * len(rollout_ids) if completions is None else [turns_of(each) for each in completions]
        batch.ids = rollout_ids
        batch.texts = texts or self.tokenizer.batch_decode(rollout_ids, skip_special_tokens=True)
        batch.counts = self._thread.submit(count_rollouts, batch.ids, batch.texts)
        tokens = self.scorer.collator.special_tokens
        columns = zip(batch.prompts, batch.rows, batch.texts, batch.ids, turns, strict=True)
        batch.rollouts = [
            Rollout(
                prompt,
                row.get("solution"),
                # Decoding left out the control tokens it met; one that the model spelled out would end the teacher's turn.
                without_special_tokens(text, tokens),
                None,
                len(ids),
                bool(ids) and ids[-1] in end_token_ids,
                self.privileged.columns_of(row),
                token_ends=() if self.method.marks is None else text_ends(self.tokenizer, ids),
                turns=messages,
            )
            for prompt, row, text, ids, messages in columns
        ]

    def rewarded(
        self, batch: RolloutBatch, rewards: Sequence[float | None], reports: Sequence[Any] | None = None
    ) -> None:
        """Give the rollouts their rewards, and what environments report of them as their column `feedback`."""
        batch.rollouts = [replace(each, reward=reward) for each, reward in zip(batch.rollouts, rewards, strict=True)]
        if reports is not None:
            tokens = self.scorer.collator.special_tokens
            pairs = zip(batch.rollouts, reports, strict=False)  # older TRL has environments for the largest batch
            batch.rollouts = [with_report(each, report, tokens) for each, report in pairs]

    def read(self, batch: RolloutBatch, group_size: int, moment: Moment) -> None:
        """Ask the method for notes, contexts and extras of the rollouts; a collective."""
        tokens = self.scorer.collator.special_tokens
        share = self.settings.solution_share_at(moment.step if batch.mode == "train" else None)
        rollouts = [replace(each, solution_share=share) for each in batch.rollouts]
        noted = self.method.noted(rollouts, self.settings, moment)
        batch.rollouts = [replace(each, note=_without_control(each.note, tokens)) for each in noted]
        self._read_own_prompts(batch, share)
        if self.method.asks is not None:
            self._ask(batch)
        if self.method.drafts is not None:
            batch.rollouts = self.drafts.write(
                batch.rollouts,
                batch.rows,
                batch.ids,
                moment,
                lambda asked, sampling: self._write(batch, asked, sampling),
            )
        reading = self.groups.read(batch.rollouts, group_size, moment)
        batch.contexts, batch.extras = (
            [complete(own, rollout) for own, rollout in zip(given, batch.rollouts, strict=True)]
            for complete, given in (
                (self.privileged.views, reading.contexts),
                (self.privileged.extra, reading.extras),
            )
        )
        batch.marks = reading.marks
        self.log(reading.metrics)
        if self.method.extras is not None:
            batch.extra_ids = [
                [] if extra is None else self._ids_of(extra, ids)
                for extra, ids in zip(batch.extras, batch.ids, strict=True)
            ]

    def _read_own_prompts(self, batch: RolloutBatch, share: float) -> None:
        """Give the rollouts the prompts that rows bring, and log how many do; a collective."""

        def encode(rollout: Rollout, view: TeacherContext) -> None:
            self.scorer.encode(rollout.prompt, view, "what it gave")

        tokens = self.scorer.collator.special_tokens
        batch.rollouts, counts = self.privileged.with_own_prompts(batch.rollouts, encode, tokens)
        if share != 1 or self.settings.solution_share != 1:
            self.log({"solution_share": share})
        if OWN_PROMPT in batch.rows[0] or self.settings.teacher_prompt_function is not None:
            gathered = gather_object([{**counts, "all": len(batch.rollouts)}])
            total = {kind: sum(each[kind] for each in gathered) for kind in gathered[0]}
            self.log({f"teacher_prompts/{kind}": total[kind] / total["all"] for kind in counts})

    def _ask(self, batch: RolloutBatch) -> None:
        """Give the rollouts what the model writes to the contexts that the method asks; a collective."""
        answers = self._write(batch, [self.method.asks(rollout, self.settings) for rollout in batch.rollouts])
        if answers is None:
            return
        used = [answer for answer in answers if answer is not None]
        accelerator = self.scorer.accelerator
        sums = torch.tensor([len(used), sum(len(answer.ids) for answer in used)], dtype=torch.float64)
        count, tokens = accelerator.reduce(sums.to(accelerator.device), reduction="sum").tolist()
        self.log({"written/texts": count, "written/tokens": tokens})
        batch.rollouts = [replace(own, written=text) for own, text in zip(batch.rollouts, answers, strict=True)]

    def _write(
        self, batch: RolloutBatch, asked: Sequence[TeacherContext | None], sampling: Mapping[str, float] | None = None
    ) -> list[Written | None] | None:
        """What the model writes to a context of each rollout, None where there is none; None where no rank asks. A collective."""
        asked = [
            None if view is None else self.privileged.view(view, rollout)
            for view, rollout in zip(asked, batch.rollouts, strict=True)
        ]
        if not any(gather_object([any(view is not None for view in asked)])):
            return None
        prompts = [
            self.scorer.encode(
                row["prompt"] if view is None else prompt, view or _PLAIN, f"generation batch row {index}"
            )
            for index, (row, prompt, view) in enumerate(zip(batch.rows, batch.prompts, asked, strict=True))
        ]
        with self._writing_as({view.weights for view in asked if view is not None}):
            # Of every row: an engine samples on all ranks at once.
            answers = self.write([prompt.ids for prompt in prompts], sampling or {})
        texts = self.tokenizer.batch_decode(answers, skip_special_tokens=True)
        tokens = self.scorer.collator.special_tokens
        return [
            None if view is None else Written(without_special_tokens(text, tokens), ids)
            for view, text, ids in zip(asked, texts, answers, strict=True)
        ]

    def _writing_as(self, weights: set[str]) -> AbstractContextManager:
        """The time in which the module has the weights that the asked contexts name; vLLM has the student's alone."""
        names = {name for found in gather_object([sorted(weights)]) for name in found}
        if len(names) > 1 or not names <= {"teacher", "live"}:
            raise ValueError(
                f"{self.method.name}: asks names the weights {sorted(names)} in one batch; name 'teacher' or 'live'."
            )
        live = names == {"live"} or self.settings.teacher_model_kind == "live"
        if live or not self.settings.use_vllm:
            return nullcontext() if live else self.scorer.teacher.active()
        if not self._told and self.scorer.accelerator.is_main_process:
            warnings.warn(
                f"{self.method.name}: what the model writes before scoring is written by the student's weights of now, where it "
                "would be the teacher's without vLLM, whose engine holds no others. Set use_vllm=False to have the teacher write.",
                stacklevel=2,
            )
        self._told = True
        return nullcontext()

    def _ids_of(self, extra: Extra, rollout: list[int]) -> list[int]:
        """Tokens of an extra, as many as a rollout may have; a text ends with the end token."""
        if extra.sequence is None:
            return rollout
        if not isinstance(extra.sequence, str):
            return extra.sequence[: self.longest]
        ids = self.tokenizer(extra.sequence, add_special_tokens=False)["input_ids"]
        return [*ids, self.tokenizer.eos_token_id][: self.longest]

    def score(self, batch: RolloutBatch, used: Sequence[bool], length: int) -> None:
        """Have the teacher score the first `length` tokens of the used rollouts, and the extras; a collective."""
        contexts = [views if some else () for views, some in zip(batch.contexts, used, strict=True)]
        prompts = [(row["prompt"], prompt) for row, prompt in zip(batch.rows, batch.prompts, strict=True)]
        sequences = [ids[:length] for ids in batch.ids]
        if self.method.extras is not None:
            contexts += [() if extra is None else extra.contexts for extra in batch.extras]
            prompts, sequences = prompts * 2, sequences + batch.extra_ids
        longest = max(map(len, batch.extra_ids), default=0)
        host = torch.device("cpu") if self._wait_on_host(len(batch.rows), length, longest) else None
        batch.target, shortened = self.scorer.score(
            contexts, prompts, sequences, (len(batch.rows), length), mode=batch.mode, result_device=host
        )
        batch.shortened = shortened[: len(batch.rows)]

    def _wait_on_host(self, num_rows: int, length: int, extra_length: int = 0) -> bool:
        states = self.method.has_target * (1 + self.method.shape(self.settings, 0).uses_direction)
        width = torch.promote_types(self.scorer.model.dtype, torch.float32).itemsize
        positions = num_rows * (length * states + extra_length * self.method.extras_have_target)
        return waits_in_host_memory(positions * self.scorer.hidden_size * width)

    def columns(self, batch: RolloutBatch, mask: torch.Tensor, first: int) -> dict[str, torch.Tensor]:
        """Columns of a scored batch, for `LossColumns.of_batch` and the log.

        Args:
            batch: scored.
            mask: (B, D) of the distilled positions.
            first: place of its first row in the batch of all ranks.
        """
        batch.target.widen(mask.size(1))
        threshold, device = getattr(self.settings, "reward_threshold", 0.5), mask.device
        rewards = [rollout.reward for rollout in batch.rollouts]
        outcomes = [-1 if reward is None else int(reward >= threshold) for reward in rewards]
        # A row has a loss where a token of its rollout counts, or where an extra stands beside one that no view reads.
        alone = [not views and extra is not None for views, extra in zip(batch.contexts, batch.extras, strict=True)]
        lengths = [float(rollout.num_tokens) for rollout in batch.rollouts]
        columns = {
            "distillation_mask": mask,
            "rollout_outcome": torch.tensor(outcomes, device=device),
            "rollout_reward": torch.tensor([float("nan") if r is None else float(r) for r in rewards], device=device),
            "rollout_index": torch.arange(first, first + len(rewards), device=device),
            "rollout_length": torch.tensor(lengths, device=device),
            "rollout_trained": mask.any(dim=1) | torch.tensor(alone, device=device) | self.method.averages_all,
        }
        if self.method.marks is not None:
            columns["rollout_mark"] = _marks(batch.marks, mask)
        return batch.target.columns() | columns | self._extra_columns(batch, mask)

    def _extra_columns(self, batch: RolloutBatch, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.method.extras is None:
            return {}
        width, pad = max(1, *map(len, batch.extra_ids)), self.tokenizer.pad_token_id
        ids = [[*own, *[pad] * (width - len(own))] for own in batch.extra_ids]
        lengths = torch.tensor([len(own) for own in batch.extra_ids], device=mask.device)
        own = torch.arange(width, device=mask.device) < lengths.unsqueeze(1)
        columns = {"extra_ids": torch.tensor(ids, device=mask.device), "extra_mask": own.to(mask.dtype)}
        return columns | (self._prompt_columns(batch, mask) if self.method.extras_have_prompts else {})

    def _prompt_columns(self, batch: RolloutBatch, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the student reads before the extras, padded on the left; one token where there is none."""
        prompts = [
            [self.tokenizer.pad_token_id]
            if extra is None
            else self.scorer.encode(prompt, extra.prompt or _PLAIN, f"generation batch row {index}").ids
            for index, (prompt, extra) in enumerate(zip(batch.prompts, batch.extras, strict=True))
        ]
        ids, own = left_pad(prompts, self.tokenizer.pad_token_id)
        return {"extra_prompt_ids": ids.to(mask.device), "extra_prompt_mask": own.to(mask.device, mask.dtype)}

    def seen(self, batch: RolloutBatch) -> Seen:
        """The batch of all ranks, for `Method.remember`; a collective."""
        target, length = batch.target, batch.target.anchor.size(1)
        views = [torch.zeros(0, 0, 2, dtype=torch.float64)] * len(batch.ids)
        if target.numbers is not None:
            rows = zip(target.numbers.double(), target.weights, batch.ids, strict=False)
            # A slice would be sent with all that it is a slice of.
            views = [row[used != 0, : min(len(ids), length)].clone().cpu() for row, used, ids in rows]
        views = gather_object(views)
        return Seen(gather_object(batch.rollouts), [view[..., 0] for view in views], [view[..., 1] for view in views])

    def sum_signals(self, batch: RolloutBatch, length: int, most: int) -> torch.Tensor:
        """`Scorer.sum_signals` of the first `most` rollouts that have a solution; a collective."""
        rows = [
            row
            for row, each in enumerate(batch.rollouts)
            if batch.ids[row] and not is_missing(each.solution) and each.teacher_prompt is None
        ][:most]
        prompts = [(batch.rows[row]["prompt"], batch.prompts[row]) for row in rows]
        rollouts = [batch.rollouts[row] for row in rows]
        views = {
            template: [self.privileged.view(TeacherContext(template, own.shown_solution), own) for own in rollouts]
            for template in ("teacher", "reference")
        }
        return self.scorer.sum_signals(prompts, views, [batch.ids[row][:length] for row in rows])


def _marks(marks: Sequence[float | Sequence[float]], mask: torch.Tensor) -> torch.Tensor:
    """(B, D) float32, a mark of a rollout on all its places, 0 behind the tokens of one that has a mark each."""
    length, rows = mask.size(1), []
    for mark in marks:
        values = list(mark[:length]) if isinstance(mark, Sequence) else [mark] * length
        rows.append([*values, *[0.0] * (length - len(values))])
    return torch.tensor(rows, device=mask.device, dtype=torch.float32).view(mask.shape)


def _without_control(note: Any, tokens: Sequence[str]) -> Any:
    """A note whose text, or a tuple's texts, spell out no control token: the teacher may be shown them."""
    if isinstance(note, tuple):
        return tuple(_without_control(part, tokens) for part in note)
    return without_special_tokens(note, tokens) if isinstance(note, str) else note
