# SPDX-License-Identifier: Apache-2.0
"""Correction prompts beside TRL's GRPO or any method here (CIPO, arXiv 2605.14539, read through an abstract and summaries).

A generation batch is sampled and rewarded as ever; its attempts wait in a queue, and some groups of the next batch answer, in
place of their own row, an earlier question with an attempt of the model's own at it. Loss and verifier are the trainer's own.
"""

import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from ..._trl.prompts import PromptSeam
from ..._trl.rollouts import RolloutTrainer
from ...model.checks import num_positions
from ...trainers.reward_log import scalar_rewards
from .attempts import SKIPPED, AttemptReader, as_json_row
from .queue import Attempt, CorrectionQueue
from .settings import CorrectionSettings

STATE_FILE = "correction_prompts.json"

INFERRED = (
    "Correction prompts are experimental. That half of the groups are corrections and a quarter of these show a right attempt, that "
    "an attempt is of the batch before and not of a correction, that groups of right and wrong rollouts come first, and the price of "
    "a broken right attempt are inferred: of the paper an abstract and summaries were read (docs/correction-prompts.md)."
)


def with_corrections(trainer_class: type, **settings: Any) -> type:
    """A trainer class whose generation batches hold correction prompts (CIPO, arXiv 2605.14539, partly inferred).

    Args:
        trainer_class: `trl.GRPOTrainer` or a trainer of this package; takes its arguments as before.
        **settings: fields of `CorrectionSettings`.

    Raises:
        ValueError: a setting is outside its range.
    """
    chosen = CorrectionSettings(**settings)
    chosen.check()
    names = {"corrections": chosen, "__doc__": trainer_class.__doc__, "__module__": trainer_class.__module__}
    return type(trainer_class.__name__, (CorrectionPrompts, trainer_class), names)


class CorrectionPrompts(PromptSeam):
    """In front of a GRPO trainer, see `with_corrections`.

    Raises:
        ValueError: the trainer has tools, environments or a rollout function, the dataset's rows are not JSON, or a penalty meets
            several reward functions.
    """

    corrections = CorrectionSettings()

    def __init__(self, *args, **kwargs):
        for name in ("tools", "rollout_func", "environment_factory"):
            if kwargs.get(name):
                raise ValueError(f"{name} is set: an attempt of several turns cannot be shown again. Leave {name} out.")
        super().__init__(*args, **kwargs)
        self.queue = CorrectionQueue(self.corrections, self.args.seed)
        self._drawn: dict[int, Attempt] = {}
        self._own_rows: list[dict] = []
        if self.corrections.correction_share:
            self._check_run()
            self.attempts = self._make_reader()
            self.run.tell(INFERRED)

    def _check_run(self) -> None:
        own, num_functions = self.corrections, len(self.reward_funcs)
        if own.broken_penalty and own.right_attempt_share and num_functions > 1:
            raise ValueError(
                f"broken_penalty={own.broken_penalty} with {num_functions} reward functions: nothing says from which it is taken. "
                "Give one function, or set broken_penalty=0 or right_attempt_share=0."
            )
        if hasattr(self.train_dataset, "__len__") and len(self.train_dataset):
            as_json_row(self.train_dataset[0])

    def _make_reader(self) -> AttemptReader:
        positions = num_positions(self.model.config)
        limits = [self.corrections.max_correction_prompt_length]
        limits += [None if positions is None else positions - self.args.max_completion_length]
        # The rows of TRL's own trainer hold their template already.
        template = self.args.prompt_template if isinstance(self, RolloutTrainer) else None
        return AttemptReader(
            self.corrections,
            getattr(self.processing_class, "tokenizer", self.processing_class),
            min((limit for limit in limits if limit is not None), default=None),
            template,
            self.args.chat_template_kwargs or {},
        )

    def _shows(self) -> bool:
        return self.mode == "train" and self.corrections.correction_share > 0

    # Hooks of PromptSeam

    def replace_rows(self, rows: list[dict]) -> list[dict]:
        if not self._shows():
            return rows
        self._own_rows, first = rows, self.accelerator.process_index * len(rows)
        num_groups = self.accelerator.num_processes * len(rows) // self.num_generations
        self._drawn = self.queue.draw(num_groups)
        right = sum(attempt.is_right for attempt in self._drawn.values())
        self.add_metrics({"corrections/share": len(self._drawn) / num_groups, "corrections/right": right / num_groups})
        shown = [self._drawn.get((first + index) // self.num_generations) for index in range(len(rows))]
        return [
            row if each is None else {**each.row, "prompt": self.attempts.prompt(each.row, each.text)}
            for row, each in zip(rows, shown, strict=True)
        ]

    def after_rewards(self, completion_ids, rewards) -> None:
        if not self._shows():
            return
        scalars = scalar_rewards(rewards, self.reward_weights)
        shown = {index: self._drawn.get(index // self.num_generations) for index in range(len(scalars))}
        self._log_rewards(scalars, shown)
        self._enqueue(completion_ids, scalars)
        threshold = self.corrections.reward_threshold
        broken = [
            index
            for index, attempt in shown.items()
            if attempt is not None and attempt.is_right and (scalars[index] or 0.0) < threshold
        ]
        rewards[broken] -= self.corrections.broken_penalty

    def _log_rewards(self, scalars: list[float | None], shown: dict[int, Attempt | None]) -> None:
        """Mean rewards before the penalty, apart for plain prompts and for those that show a wrong or a right attempt."""
        kinds: dict[str, list[float]] = {"plain": [], "wrong": [], "right": []}
        for index, attempt in shown.items():
            kind = "plain" if attempt is None else "right" if attempt.is_right else "wrong"
            if scalars[index] is not None:
                kinds[kind].append(scalars[index])
        self.add_metrics(
            {f"corrections/reward_{kind}": math.fsum(own) / len(own) for kind, own in kinds.items() if own}
        )

    def _enqueue(self, completion_ids: list[list[int]], scalars: list[float | None]) -> None:
        """Let attempts at the rows' own questions wait; a collective, after which every rank's queue is the same."""
        size, first, counts = self.num_generations, self.accelerator.process_index * len(completion_ids), Counter()
        texts = self.attempts.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)
        rows = [row if (first + index) % size == 0 else None for index, row in enumerate(self._own_rows)]
        gathered = gather_object(list(zip(rows, texts, strict=True)))
        for group in sorted(set(range(len(gathered) // size)) - self._drawn.keys()):
            members = gathered[group * size : (group + 1) * size]
            row, texts = as_json_row(members[0][0]), [text for _, text in members]
            rewards = scalars[group * size : (group + 1) * size]
            self.queue.add(self.attempts.attempts(row, texts, rewards, self.queue.batch, self.args.seed, counts))
        self.add_metrics({"corrections/queue": float(len(self.queue.attempts))})
        self.add_metrics({f"corrections/skipped_{reason}": float(counts[reason]) for reason in SKIPPED})

    # Hooks of CheckedTrainer

    def save_extra_state(self, checkpoint: str) -> None:
        super().save_extra_state(checkpoint)
        if self.args.should_save:
            (Path(checkpoint) / STATE_FILE).write_text(json.dumps(self.queue.state()), encoding="utf-8")

    def load_extra_state(self, checkpoint: str) -> None:
        super().load_extra_state(checkpoint)
        file = Path(checkpoint) / STATE_FILE
        if file.exists():
            self.queue.restore(json.loads(file.read_text(encoding="utf-8")))
        elif self.corrections.correction_share:
            warnings.warn(
                f"{checkpoint} holds no {STATE_FILE}: its run had no correction prompts. The queue begins empty.",
                stacklevel=2,
            )
