# SPDX-License-Identifier: Apache-2.0
"""A step of a method's trainer whose rules were recorded, and an inspector of the same weights."""

import torch
from groups import bare
from pages import moved
from steps import loss_of_rows

from trl_opsd.inspect.compute import Inspector
from trl_opsd.inspect.records import SampledRollout

TEXTS = ("so \\boxed{3}", "wait, 10 it is", "a", "it is \\boxed{10} then")
WRONG = ("wait, 10 it is", "a", "no", "5")
COLUMNS = {"skills": ["Add in pairs.", "Do not guess."], "skill_scores": [0.5, 0.1], "plan": "add the numbers"}
COLUMNS |= {"feedback": "no", "translation": "1+1=?", "spans": [{"start": 0, "end": 2, "kind": "K", "type": "a sum"}]}
GROUPS = {"num_generations": 4, "max_completion_length": 24}
HOT = {"temperature": 1.2}


class Step:
    """A step of a method's trainer on one group, with what its rules gave, and an inspector of the same weights."""

    def __init__(self, trainer, method, recorded, rows):
        self.trainer, self.recorded = trainer, recorded
        first = bare(trainer).eval()
        moved(trainer)
        student = bare(trainer).eval()
        self.loss, self.batch = loss_of_rows(trainer, rows)
        self.order = self.batch["rollout_index"].tolist()
        args = trainer.args
        self.inspector = Inspector(student, first, trainer.tokenizer, method, args, 0, memory=dict(trainer.memory))
        own = trainer._batch
        group = [SampledRollout(rollout, ids) for rollout, ids in zip(own.rollouts, own.ids, strict=True)]
        self.records = self.inspector.inspect_group(group)

    def row_of(self, record):
        """The place of a record's rollout in the batch."""
        texts = [rollout.completion for rollout in self.trainer._batch.rollouts]
        return self.order.index(texts.index(record.rollout.completion))

    def every_record(self):
        """The records of all rollouts of the batch that some view reads, group by group."""
        own, size = self.trainer._batch, self.trainer.args.num_generations
        for start in range(0, len(own.ids), size):
            places = range(start, start + size)
            group = [SampledRollout(own.rollouts[place], own.ids[place]) for place in places]
            yield from self.inspector.inspect_group(group)

    def kept_by(self, record, name):
        """What the trainer's rule kept under a name, of the tokens of a record (..., T); 0 where the trainer reads none."""
        calls = [facts.kept[name] for found in self.recorded.values() for facts, _ in found if name in facts.kept]
        mask = self.batch["distillation_mask"]
        if self.trainer.method.pointwise:
            values = torch.zeros(mask.numel(), dtype=torch.float64)
            values[self.batch["distilled_positions"]] = torch.cat(calls).double()
            values = values.view(mask.shape)
        else:
            values = calls[0].double().expand(*calls[0].shape[:-2], *mask.shape)
        own = values[..., self.row_of(record), : len(record.ids)]
        return torch.nn.functional.pad(own, (0, len(record.ids) - own.size(-1)))


def close(numbers, expected):
    torch.testing.assert_close(torch.as_tensor(numbers, dtype=torch.float64), expected.double(), atol=1e-5, rtol=1e-5)
