# SPDX-License-Identifier: Apache-2.0
"""OPSD: the teacher is the same model reading the reference solution too (arXiv 2601.18734)."""

from ..methods import OPSD
from .config import OPSDConfig
from .self_distillation import SelfDistillationTrainer


class OPSDTrainer(SelfDistillationTrainer):
    """Distils a model from itself reading the reference solution, on its own rollouts (arXiv 2601.18734).

    Takes the arguments of `trl.GRPOTrainer`; `reward_funcs` is optional. See `SelfDistillationTrainer`.

    Example:

        dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "2+3=?"}], "solution": "\\\\boxed{5}"}])
        trainer = OPSDTrainer(model="Qwen/Qwen3-1.7B", args=OPSDConfig(output_dir="out"), train_dataset=dataset)
        trainer.train()
    """

    method = OPSD
    config_class = OPSDConfig
