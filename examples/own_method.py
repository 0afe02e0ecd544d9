# SPDX-License-Identifier: Apache-2.0
"""A method of your own in one file: the teacher reads one right peer of the group, and wrong rollouts follow it.

A method is a rule from a group of rollouts to what the teacher reads, and a `Method` around it. Nothing in the package
changes; the trainer, its settings and its tests are those of every other method.

    python examples/own_method.py
"""

from trl_opsd import Method, OPSDConfig
from trl_opsd.demo import TEACHER_PROMPT_TEMPLATE, build_dataset, model_path
from trl_opsd.teacher.contexts import TeacherContext
from trl_opsd.trainers.self_distillation import SelfDistillationTrainer


def right_peer_contexts(group, settings, moment):
    """Contexts of every wrong rollout: the shortest right one of its group, or none."""
    right = [rollout.completion for rollout in group if rollout.reward == 1.0]
    if not right:
        return [()] * len(group)
    peer = TeacherContext("teacher", min(right, key=len), anchor=1.0)
    return [() if rollout.reward == 1.0 else (peer,) for rollout in group]


class RightPeerTrainer(SelfDistillationTrainer):
    """Distils wrong rollouts from the model that reads a right one."""

    method = Method(
        name="right peer",
        contexts=right_peer_contexts,
        needs_solution=False,
        needs_group=True,
        needs_reward=True,
        paper={"title": "Reinforcement Learning via Self-Distillation", "id": "2601.20802", "citation": ""},
    )


if __name__ == "__main__":
    args = OPSDConfig(
        output_dir="outputs/own_method",
        max_steps=2,
        num_generations=4,
        max_completion_length=48,
        clip=None,
        teacher_prompt_template=TEACHER_PROMPT_TEMPLATE,
        logging_steps=1,
        bf16=False,
        report_to="none",
    )
    trainer = RightPeerTrainer(model=model_path(), args=args, train_dataset=build_dataset("train", 64))
    trainer.train()
