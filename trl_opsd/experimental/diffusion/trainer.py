# SPDX-License-Identifier: Apache-2.0
"""d-OPSD: a masked-diffusion language model learns from itself that sees a part of its finished answer (arXiv 2606.18195)."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled

from ..._trl.checkpoints import CheckedTrainer
from ...checkpoints.state import load_state, save_state
from ...evaluation.sampling import evaluation_mode
from ...teacher.weights import Teacher
from .config import DiffusionOPSDConfig
from .drawing import Drawer, Sample
from .logs import Means
from .reading import check_model, reader_of, token_ids
from .rows import EncodedRow, RepeatedRows, collate, encode_rows
from .update import Update, update_loss


class DiffusionOPSDTrainer(CheckedTrainer):
    """Distils a masked-diffusion model from itself with a part of its own right answer filled in (d-OPSD, arXiv 2606.18195).

    For each prompt answers are sampled until one is right, and all its states are kept. The teacher reads a state with a share of
    the later blocks as the finished answer has them. At the positions of the current block of which the teacher is surest, the
    student, which reads the bare state, is pulled to it. Prompts without a right answer have loss 0.

    The teacher has the initial weights: with a fresh adapter that is the model without it, else a copy of what trains.

    Args:
        model: a model whose forward takes `input_ids` and gives `logits` at every position, reading both sides; `attention_mask`
            where a batch has prompts of unequal length.
        args: a `DiffusionOPSDConfig`.
        train_dataset: columns `prompt` and `solution`.
        processing_class: the tokenizer, with a chat template where prompts are conversations.
        peft_config: an adapter to train; `peft.LoraConfig(**settings.LORA)` is the authors'.
        **others: `callbacks` and `optimizers`, as in transformers.

    Raises:
        ValueError: before any training, for a dataset, model or setting it cannot work with.
    """

    config_class = DiffusionOPSDConfig

    def __init__(self, model, args, train_dataset, processing_class, peft_config=None, **others):
        if not isinstance(args, DiffusionOPSDConfig):
            raise ValueError(f"args is a {type(args).__name__}; give a DiffusionOPSDConfig.")
        _refuse_engines(args)
        mask_token_id, eos_token_id = token_ids(args, processing_class)
        check_model(model, args, mask_token_id, pads=args.per_device_train_batch_size > 1)
        rows = encode_rows(train_dataset, processing_class, args, mask_token_id)
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        super().__init__(
            model=model,
            args=args,
            data_collator=collate,
            train_dataset=rows,
            processing_class=processing_class,
            **others,
        )
        self.model_accepts_loss_kwargs = False  # then HF Trainer takes the mean of an optimizer step's micro-batches
        pad_token_id = processing_class.pad_token_id
        self.pad_token_id = eos_token_id if pad_token_id is None else pad_token_id
        self.mask_token_id, self.rule = mask_token_id, args.rule()
        self.drawer = Drawer(processing_class, args, mask_token_id, eos_token_id, self.accelerator.device)
        self.teacher = Teacher(args.teacher_model_kind, self.model, fresh_adapter=peft_config is not None)
        self.run.remember_weights(self.model, self.teacher.values)
        self.means = Means()
        self.micro_batch = 0  # of the optimizer step
        self.samples: list[list[Sample]] = []  # by micro-batch

    def get_train_dataloader(self) -> DataLoader:
        """Rows in groups of an optimizer step, each group as often as its samples have updates."""
        args = self.args
        group = args.per_device_train_batch_size * args.gradient_accumulation_steps * self.accelerator.num_processes
        order = RepeatedRows(
            len(self.train_dataset), group, args.updates_per_sample, args.seed, lambda: self.state.global_step
        )
        loader = DataLoader(
            self.train_dataset, batch_size=args.per_device_train_batch_size, sampler=order, collate_fn=collate
        )
        return self.accelerator.prepare(loader)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean over prompts of the loss of an update.

        Args:
            model: the student, as the engine wraps it.
            inputs: a micro-batch of `collate`.
            return_outputs: must be False.
            num_items_in_batch: not read.

        Raises:
            FloatingPointError: the loss is not finite.
        """
        update = self.state.global_step % self.args.updates_per_sample
        samples = self._samples_of(inputs["rows"], update)
        self.micro_batch = (self.micro_batch + 1) % self.args.gradient_accumulation_steps
        now = Update.of(samples, update, self.args)
        wanted = self._teacher_logits(now)
        loss, facts = update_loss(
            reader_of(model, self.pad_token_id), now, wanted, self.rule, self.args, self.mask_token_id
        )
        if not bool(loss.isfinite()):
            raise FloatingPointError(
                f"The loss is not finite at step {self.state.global_step} for the rows {[row['index'] for row in inputs['rows']]}. "
                "Lower learning_rate or max_grad_norm, or look at these rows."
            )
        self.means.add(facts)
        return loss

    def _samples_of(self, rows: list[dict[str, Any]], update: int) -> list[Sample]:
        """The samples of a micro-batch: drawn at the first update of a group, kept for the later ones."""
        if self.micro_batch < len(self.samples) and update:
            return self.samples[self.micro_batch]
        if self.micro_batch == 0:
            self.samples = []
        model = self.accelerator.unwrap_model(self.model)
        with evaluation_mode(model):
            drawn = self.drawer.draw(
                reader_of(model, self.pad_token_id),
                [EncodedRow(**row) for row in rows],
                seed=self.args.seed,
                step=self.state.global_step,
            )
        torch.clear_autocast_cache()  # weights that were cast without a gradient would be the student's too
        self.samples.append(drawn)
        self.means.add_samples(drawn)
        return drawn

    @torch.no_grad()
    def _teacher_logits(self, update: Update) -> torch.Tensor:
        """Logits (n, C, V) of the teacher; every process asks, whatever it trains on."""
        with self.teacher.active():
            logits = reader_of(self.accelerator.unwrap_model(self.model), self.pad_token_id)(
                update.prompts, update.taught
            )
        torch.clear_autocast_cache()
        return logits

    # Hooks of CheckedTrainer

    def save_pending(self, checkpoint: Path) -> None:
        """Write the samples that later updates of their group read; a collective of none."""
        values = {"run_id": self.run.id, "run": self._shape_of_run(), "counts": [len(each) for each in self.samples]}
        batches = [asdict(sample) for samples in self.samples for sample in samples]
        accelerator = self.accelerator
        save_state(checkpoint, accelerator.process_index, accelerator.num_processes, values, batches)

    def load_pending(self, checkpoint: str) -> None:
        """Read them back; where the run has another shape and a group is not done, its samples are drawn anew."""
        accelerator = self.accelerator
        state = load_state(checkpoint, accelerator.process_index, accelerator.num_processes, accelerator.device)
        if state is not None and state[0]["run"] == self._shape_of_run() and state[0]["run_id"] == self.run.id:
            drawn = iter([Sample(**batch) for batch in state[1]])
            self.samples = [[next(drawn) for _ in range(count)] for count in state[0]["counts"]]
        elif self.state.global_step % self.args.updates_per_sample:
            warnings.warn(
                f"{checkpoint} stands between two updates of one sample and does not hold it for this number of processes, "
                "per_device_train_batch_size, gradient_accumulation_steps and updates_per_sample: it is sampled anew, so the "
                "run is not the uninterrupted one.",
                stacklevel=2,
            )

    def _shape_of_run(self) -> list[int]:
        args = self.args
        return [args.per_device_train_batch_size, args.gradient_accumulation_steps, args.updates_per_sample]

    def log(self, logs: Mapping[str, float], start_time: float | None = None) -> None:
        """Log the parent's numbers and ours; collective."""
        means = self.means.reduced(lambda sums: self.accelerator.reduce(sums, reduction="sum"), self.accelerator.device)
        super().log({**logs, **means}, start_time)


def _refuse_engines(args: DiffusionOPSDConfig) -> None:
    """Refuse what shards the model, which the sampler reads whole on every process."""
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        raise ValueError(
            f"fsdp={args.fsdp!r} shards the model, which the sampler reads whole. Launch with DDP or ZeRO-2."
        )
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            "deepspeed: ZeRO-3 shards the model, which the sampler reads whole. Launch with DDP or ZeRO-2."
        )
