# SPDX-License-Identifier: Apache-2.0
"""From a scored generation batch to targets: contexts, teacher forwards, and what is logged about both."""

import random
import warnings
from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object

from .._trl.rollouts import RolloutTrainer
from ..losses import SignalDecomposition
from ..methods import Method
from ..model.heads import whole_head
from ..monitoring.diagnostics import sum_decompositions
from ..monitoring.markers import count_markers
from ..monitoring.repetition import count_repeated
from ..rows.checks import check_rows, without_special_tokens
from ..rows.texts import Prompt, as_text_turns, fill_template, is_missing, rewrite_last_turn
from ..teacher.contexts import Contexts, Rollout, TeacherContext
from ..teacher.jobs import ScoringJob
from ..teacher.prompts import EncodedContext
from ..teacher.weights import Teacher
from .checks import named_place
from .teaching import SelfTeaching

_BATCHES_TO_WARN = 10
_PLAIN = TeacherContext("plain", None)
DECOMPOSED_ROLLOUTS = 8  # per process


class TargetTrainer(SelfTeaching, RolloutTrainer):
    """Adds the teacher's hidden states to a generation batch, while its groups are still together."""

    method: Method

    def prepare_rows(self, rows: list[dict]) -> list[dict]:
        name = "generation batch"
        tokens = self.collator.special_tokens
        check_rows(rows, name, needs_solution=self.method.needs_solution, special_tokens=tokens)
        rows = [{**row, "prompt": as_text_turns(row["prompt"])} for row in rows]
        self._raw_prompts = [row["prompt"] for row in rows]
        template = self.args.prompt_template
        if template is not None:
            rows = [
                {**row, "prompt": rewrite_last_turn(row["prompt"], lambda text: fill_template(template, prompt=text))}
                for row in rows
            ]
        self._encoded = {}
        for index, row in enumerate(rows):  # before it is sampled from: an error here has the row's place
            self._encode(row["prompt"], _PLAIN, f"{name} row {index}: `prompt`")
        if self.args.sample_distilled_only:
            self.limit_rollouts(self.distilled_length() if self.mode == "train" else None)
        return rows

    def before_rewards(self, rows, completions, rollout_ids) -> None:
        """Have answers verified while the teacher scores, where no context reads a reward."""
        self._early, self._texts = None, self.tokenizer.batch_decode(rollout_ids, skip_special_tokens=True)
        begins = [reward.begin for reward in self.reward_funcs if hasattr(reward, "begin")]
        reads_rewards = self.method.needs_reward or self.method.label is not None
        if not begins or reads_rewards or self.args.mask_truncated_completions:
            return
        for begin in begins:
            begin(completions, [row.get("solution") for row in rows])
        rollouts, contexts = self._read_rollouts(rows, rollout_ids, [None] * len(rows))
        longest = max(map(len, rollout_ids))
        length = min(longest, self.distilled_length() or longest)
        spans = [ids[:length] for ids in rollout_ids]
        skipped = self.args.num_loss_tokens_to_skip
        scored = [views if len(ids) > skipped else () for views, ids in zip(contexts, spans, strict=True)]
        self._early = self._score(rows, rollouts, scored, spans, length)

    def _read_rollouts(self, rows, rollout_ids, rewards) -> tuple[list[Rollout], list[Contexts]]:
        """What a method is told of each rollout, and what the teacher reads of it."""
        columns = zip(self._raw_prompts, rows, self._texts, rewards, rollout_ids, strict=True)
        rollouts = [
            # Decoding left out the control tokens it met; one that the model spelled out would end the teacher's turn.
            Rollout(
                prompt,
                row.get("solution"),
                without_special_tokens(text, self.collator.special_tokens),
                reward,
                len(ids),
                bool(ids) and ids[-1] in self.end_token_ids,
            )
            for prompt, row, text, reward, ids in columns
        ]
        groups, own = self._groups(rollouts)
        return rollouts, self._contexts(groups)[own]

    def add_targets(self, rows, batch, rewards, rollout_ids) -> dict[str, Any]:
        batch_size = len(rows)
        first = self.accelerator.process_index * batch_size
        self.add_metrics({"rewards/missing": rewards.isnan().all(dim=1).float().mean().item()})
        rewards = self._scalar_rewards(rewards)[first : first + batch_size]
        rollouts, contexts = self._read_rollouts(rows, rollout_ids, rewards)
        mask = self._distilled_mask(batch, contexts)
        threshold = getattr(self.args, "reward_threshold", 0.5)
        spans = [ids[: mask.size(1)] for ids in rollout_ids]
        if self._early is None:
            any_distilled = mask.any(dim=1).tolist()
            scored = [views if some else () for views, some in zip(contexts, any_distilled, strict=True)]
            self._early = self._score(rows, rollouts, scored, spans, mask.size(1))
        (target, shortened), self._early = self._early, None
        target.widen(mask.size(1))
        if self._decomposition_is_due():
            self._log_decomposition(rows, rollouts, spans, mask.size(1))
        batch |= target.columns() | {"distillation_mask": mask}
        batch["rollout_outcome"] = torch.tensor(
            [-1 if rollout.reward is None else int(rollout.reward >= threshold) for rollout in rollouts],
            device=mask.device,
        )
        batch["rollout_index"] = torch.arange(first, first + batch_size, device=mask.device)
        if self.mode == "train":
            self._prompt_texts = [str(prompt)[:80] for prompt in self._raw_prompts]
        self._log_rollouts(rollout_ids, self._texts, shortened, target.num_tokens)
        self._warn_of_masked_rollouts(batch)
        return batch

    def _groups(self, rollouts: list[Rollout]) -> tuple[list[list[Rollout]], slice]:
        """Rollouts by prompt, of all ranks as a group may straddle them, and which of the flat list are this rank's."""
        if not self.method.needs_group:
            return [[rollout] for rollout in rollouts], slice(len(rollouts))
        size = self.num_generations if self.mode == "train" else self.num_generations_eval
        first = len(rollouts) * self.accelerator.process_index
        own = slice(first, first + len(rollouts))
        rollouts = gather_object(rollouts)
        return [rollouts[start : start + size] for start in range(0, len(rollouts), size)], own

    def _contexts(self, groups: list[list[Rollout]]) -> list[Contexts]:
        """Teacher contexts of all rollouts of the groups."""
        draw = random.Random(f"{self.args.seed}/{self.state.global_step}")  # the same on every rank
        contexts = [views for group in groups for views in self.method.contexts(group, self.args, draw)]
        if self.method.label is not None:
            self._log_groups([self.method.label(group, self.args) for group in groups], contexts, len(groups[0]))
        return contexts

    def _log_groups(self, labels: list[str], contexts: list[Contexts], size: int) -> None:
        """Shares of the kinds of groups and of those used; warn when rewards split none for long."""
        used = [any(contexts[start : start + size]) for start in range(0, len(contexts), size)]
        shares = {f"groups/{label}": count / len(labels) for label, count in Counter(labels).items()}
        self.add_metrics({"groups/used": sum(used) / len(used), **shares})
        self._group_labels.update(labels)
        self._unsplit_batches = 0 if "mixed" in labels else self._unsplit_batches + 1
        if self._unsplit_batches == _BATCHES_TO_WARN:
            warnings.warn(
                f"The rewards split no group into right and wrong in {_BATCHES_TO_WARN} generation batches: "
                f"{dict(self._group_labels)}. Check reward_funcs and reward_threshold, or choose problems of another "
                "difficulty.",
                stacklevel=2,
            )

    def _scalar_rewards(self, rewards: torch.Tensor) -> list[float | None]:
        """One weighted reward per rollout of the world's batch, None where no function gave one."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        return [None if value != value else value for value in total.tolist()]

    def _distilled_mask(self, batch: dict[str, Any], contexts: list[Contexts]) -> torch.Tensor:
        """(B, D), 1 on the positions of a rollout that are distilled: its own tokens, never a tool's."""
        mask = batch["completion_mask"]
        mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask.clone()
        length = self.distilled_length()
        if self.mode == "train" and self.args.distillation_length_start is not None:
            self.add_metrics({"distillation_length": float(length)})
        mask = mask[:, :length]
        mask[:, : self.args.num_loss_tokens_to_skip] = 0
        mask[torch.tensor([not views for views in contexts], device=mask.device)] = 0
        return mask

    def _encode(self, prompt: Prompt, view: TeacherContext, place: str) -> EncodedContext:
        """`collator.encode`, once a generation batch for each prompt and text."""
        key = (str(prompt), view.template, view.slot, view.slot_tokens)
        if key not in self._encoded:
            with named_place(place):
                self._encoded[key] = self.collator.encode(prompt, view)
        return self._encoded[key]

    def _score(self, rows, rollouts, contexts, ids, length):
        """Teacher hidden states of the batch, and per rollout whether its context was shortened."""
        jobs, shortened = [], [False] * len(rollouts)
        for row, views in enumerate(contexts):
            for view in views:
                prompt = rows[row]["prompt"] if view.template == "plain" else rollouts[row].prompt
                context = self._encode(prompt, view, f"generation batch row {row}")
                shortened[row] |= context.shortened
                jobs.append(ScoringJob(context.ids, ids[row], row, view.anchor, view.direction))
        with self.diagnostics[self.mode].clock("teacher_forward", self.accelerator.device):
            target = self._run_teacher(
                self.teacher,
                jobs,
                (len(rollouts), length, self.hidden_size),
                with_direction=self.method.shape(self.args, 0).uses_direction,
                result_device=torch.device("cpu") if self.args.offload_targets else None,
            )
        self._target_heads[self.mode] = self.teacher.head
        return target, shortened

    def _decomposition_is_due(self) -> bool:
        interval, step = self.args.decomposition_steps, self.state.global_step
        before = step - self._updates_per_generation()
        return self.mode == "train" and interval > 0 and step // interval > before // interval

    def _log_decomposition(self, rows, rollouts, ids, length) -> None:
        """Log how much of the teacher's signal on some rollouts the solution alone explains; costs three views of them."""
        picked = [row for row, rollout in enumerate(rollouts) if ids[row] and not is_missing(rollout.solution)]
        picked = picked[:DECOMPOSED_ROLLOUTS]

        def states(teacher: Teacher, template: str) -> torch.Tensor:
            jobs = []
            for place, row in enumerate(picked):
                prompt = rows[row]["prompt"] if template == "plain" else rollouts[row].prompt
                view = TeacherContext(template, None if template == "plain" else rollouts[row].solution, anchor=1.0)
                context = self._encode(prompt, view, f"generation batch row {row}")
                jobs.append(ScoringJob(context.ids, ids[row], place, 1.0, 0.0))
            shape = (len(picked), length, self.hidden_size)
            anchor = self._run_teacher(teacher, jobs, shape, with_direction=False).anchor
            return torch.cat([anchor[place, : len(job.rollout)] for place, job in enumerate(jobs)] or [anchor[:0, 0]])

        student = Teacher("live", self.model)
        views = states(student, "plain"), states(self.teacher, "teacher"), states(self.teacher, "reference")
        with whole_head(self.model) as head:
            heads = student.head or head, self.teacher.head or head, self.teacher.head or head
            sums = sum_decompositions(
                *zip(views, heads, strict=True), temperature=self.args.loss_temperature, num_tokens=self.num_tokens
            )
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, value in zip(SignalDecomposition._fields, sums, strict=True):
            self.add_metrics({f"decomposition/{name}": value / max(count, 1)})

    def _log_rollouts(self, rollout_ids, texts, shortened, num_teacher_tokens) -> None:
        markers = [count_markers(text, self.args.reflection_markers) for text in texts]
        repeated = count_repeated(rollout_ids)
        sums = [sum(markers), sum(map(len, rollout_ids)), sum(shortened), len(texts), num_teacher_tokens, *repeated]
        sums = torch.tensor(sums, dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").tolist()
        self.add_metrics(
            {
                "reflection_markers_per_1000": 1000 * sums[0] / max(sums[1], 1),
                "completions/repetition": sums[5] / max(sums[6], 1),
                "teacher/solution_shortened": sums[2] / sums[3],
                "teacher/tokens_computed": sums[4],
            }
        )
        self.add_table_column("divergence", [float("nan")] * len(texts))
        self.add_table_column("reflection_markers", markers)
        self.add_table_column("solution_shortened", shortened)

    def _warn_of_masked_rollouts(self, batch: dict[str, Any]) -> None:
        """Warn where `mask_truncated_completions` leaves nothing of a generation batch; a collective."""
        if not self.args.mask_truncated_completions or self.mode == "eval":
            return
        kept = self.accelerator.reduce(batch["completion_mask"].any(dim=1).sum(), reduction="sum")
        if not kept and self.is_world_process_zero():
            warnings.warn(
                "Every rollout of a generation batch was cut at its length limit, and mask_truncated_completions=True "
                "leaves them all out: the batch trains on nothing. Raise max_completion_length "
                f"({self.args.max_completion_length}), or set mask_truncated_completions=False.",
                stacklevel=2,
            )
