# SPDX-License-Identifier: Apache-2.0
"""The config of d-OPSD: its settings over HF Trainer's, with the authors' values of these."""

from dataclasses import dataclass

from transformers import TrainingArguments

from ...losses import Divergence, Support
from ...settings.fields import check_settings, option
from .settings import DiffusionOPSDSettings


@dataclass
class DiffusionOPSDConfig(DiffusionOPSDSettings, TrainingArguments):
    """Settings of `DiffusionOPSDTrainer`: `transformers.TrainingArguments` with the authors' values, and `DiffusionOPSDSettings`.

    The authors train on four devices, one prompt each. Their answers feed `updates_per_sample` optimizer steps.

    Raises:
        ValueError: a field outside its range; the message names the field, its value and what to set instead.
    """

    learning_rate: float = option(5e-6, "Initial learning rate of AdamW.")
    lr_scheduler_type: str = option("constant_with_warmup", "Schedule of the learning rate.")
    warmup_steps: float = option(
        0.0001, "Share of the steps in which the learning rate grows; a number of steps from 1."
    )
    adam_beta2: float = option(0.99, "Second decay rate of AdamW.")
    weight_decay: float = option(0.1, "Weight decay of AdamW.")
    max_grad_norm: float = option(0.2, "Largest gradient norm; larger ones are scaled down.")
    num_train_epochs: float = option(
        1, "Passes over the rows, each of which takes `updates_per_sample` visits of a row."
    )
    per_device_train_batch_size: int = option(1, "Prompts per device and micro-batch.")
    logging_steps: float = option(1, "Steps between logs.")
    save_steps: float = option(25, "Steps between checkpoints.")
    bf16: bool = option(True, "Compute in bfloat16.")
    remove_unused_columns: bool = option(False, "Not read: rows are encoded by the trainer.")
    logging_nan_inf_filter: bool = option(False, "Not read: a loss that is not finite ends the run.")

    def __post_init__(self):
        super().__post_init__()
        check_settings(self)
        if self.eval_strategy != "no":
            raise ValueError(
                f"eval_strategy={self.eval_strategy!r}: the trainer has no evaluation. Set it to 'no' and measure with "
                "trl_opsd.experimental.diffusion.accuracy."
            )

    def rule(self) -> Divergence:
        """The divergence of a position."""
        support = None if self.loss_top_k is None else Support(self.loss_top_k, of="target", remainder="renormalise")
        clip = {} if self.clip_value is None else {"clip": "upper", "clip_value": self.clip_value}
        return Divergence(self.divergence, support=support, **clip)
