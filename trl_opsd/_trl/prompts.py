# SPDX-License-Identifier: Apache-2.0
"""TRL's private seam of a generation batch's prompts, in front of any of its GRPO trainers and of ours alike."""

from functools import partial
from typing import Any

import torch
from trl import GRPOTrainer

from .checkpoints import CheckedTrainer


def _seek_epoch(sampler: Any, epoch: int) -> None:
    """Put TRL's sampler where it stands after `epoch` epochs; a resumed run would otherwise repeat the first order."""
    sampler.generator.manual_seed(sampler.seed)
    for _ in range(epoch):
        torch.randperm(sampler.num_samples, generator=sampler.generator)


class OrderAndLog(GRPOTrainer):
    """A GRPO trainer whose resumed run keeps the order of its rows, and that logs numbers in the mode of the moment."""

    @property
    def mode(self) -> str:
        """ "train" or "eval"."""
        return "train" if self.model.training else "eval"

    def add_metrics(self, metrics: dict[str, float]) -> None:
        """Log numbers that are the same on every rank; averaged over the logging interval."""
        for name, value in metrics.items():
            self._metrics[self.mode][name].append(value)

    def _get_train_sampler(self, dataset=None):
        sampler = super()._get_train_sampler(dataset)
        if getattr(sampler, "shuffle", False):
            sampler.set_epoch = partial(_seek_epoch, sampler)
        return sampler


class PromptSeam(OrderAndLog, CheckedTrainer, GRPOTrainer):
    """In front of a GRPO trainer: other rows may take the place of a generation batch's, and what became of them is told."""

    # Hooks

    def replace_rows(self, rows: list[dict]) -> list[dict]:
        """This rank's rows of a generation batch as they are sampled from; all rows of one group must stay alike."""
        return rows

    def after_rewards(self, completion_ids: list[list[int]], rewards: torch.Tensor) -> None:
        """Read, and perhaps change in place, the rewards of a generation batch; a collective.

        Args:
            completion_ids: of this rank's rollouts.
            rewards: (world batch, functions), NaN where a function gave none; the same on every rank.
        """

    # TRL's seams

    def _generate_and_score_completions(self, inputs):
        return super()._generate_and_score_completions(self.replace_rows(inputs))

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.after_rewards(completion_ids_list, rewards)
        return rewards
