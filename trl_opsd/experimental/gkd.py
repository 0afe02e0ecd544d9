# SPDX-License-Identifier: Apache-2.0
"""OPSD for scripts of TRL's experimental GKDTrainer: its datasets, its `lmbda`, its sampling; our teacher and loss."""

import random
from typing import Any

import torch
from transformers import TrainerCallback

from .._trl.checkpoints import CheckedTrainer
from .._trl.naming import NamedByMethod
from ..card import describe_run
from ..losses import OutputHead, Target, token_weights
from ..methods import OPSD
from ..monitoring.diagnostics import Diagnostics
from ..monitoring.guard import ClipWarning
from ..rows.passes import check_datasets
from ..teacher.contexts import Moment, Rollout
from ..teacher.states import TargetStates
from ..trainers.checks import check_fills_a_batch, check_trained, config_of
from ..trainers.columns import LossColumns
from ..trainers.kernels import prepare_layer_kernels
from ..trainers.scorer import Scorer
from ..trainers.step_loss import StepLoss
from .gkd_config import GKDTrainer, NoTeacher, OPSDGKDConfig, refuse_arguments, refuse_fsdp
from .gkd_rows import IGNORED, MessagesCollator, check_messages


class OPSDGKDTrainer(CheckedTrainer, NamedByMethod, GKDTrainer):
    """GKDTrainer that distils a model from itself reading the reference solution (arXiv 2601.18734).

    With the chance `lmbda` a micro-batch is sampled from the student; otherwise the answers of its `messages` are
    scored. Sampling is by `generate`, one micro-batch at a time: for vLLM, rewards or groups use `OPSDTrainer`, whose
    loss and gradient these are at `lmbda=1` and one micro-batch a step. A micro-batch is sampled before the next one
    is known, so a loss is divided by the micro-batch's count over all ranks, and a step takes the mean of its
    micro-batches: tokens of a micro-batch with few of them weigh more.

    Args:
        model: name or folder, or a causal LM.
        args: an `OPSDGKDConfig`.
        train_dataset: columns `messages` (a conversation, the answer last) and `solution` (what the teacher reads).
        eval_dataset: the same; its answers are scored as they are.
        processing_class: the tokenizer.
        callbacks, optimizers, peft_config: as in TRL.
        **others: GKDTrainer's other arguments, which are refused by name.

    Raises:
        ValueError: before any training, for a dataset, model or setting it cannot work with.
        UnsupportedTRLError: when imported under a TRL whose GKDTrainer is another.
    """

    method = OPSD
    config_class = OPSDGKDConfig

    def __init__(
        self,
        model,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        callbacks=None,
        optimizers=(None, None),
        peft_config=None,
        **others,
    ):
        refuse_arguments(type(self).__name__, others)
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or self.config_class(f"{name.rstrip('/').split('/')[-1] or 'model'}-{self.method.name}")
        if not isinstance(args, self.config_class):
            raise ValueError(f"args is a {type(args).__name__}; give an {self.config_class.__name__}.")
        refuse_fsdp(args)
        prepare_layer_kernels(args)
        if train_dataset is None:
            raise ValueError("train_dataset is None; give a dataset with the columns `messages` and `solution`.")
        check_datasets(check_messages, train_dataset, eval_dataset)
        if isinstance(model, str):  # a pickle can run code when it is read
            args.model_init_kwargs = {"use_safetensors": True, **(args.model_init_kwargs or {})}
        super().__init__(
            model=model,
            teacher_model=NoTeacher(config_of(model, args)),
            args=args,
            data_collator=list,  # ours needs the tokenizer, which the parent may load
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        # Then HF Trainer counts no labels, which sampling replaces, and divides each loss by the accumulation steps.
        self.model_accepts_loss_kwargs = False
        self.scorer = Scorer(
            self.model,
            self.accelerator,
            self.method,
            args,
            self.tokenizer,
            fresh_adapter=peft_config is not None,
            shares_contexts=False,
        )
        self.scorer.make_teacher()
        self.data_collator = MessagesCollator(self.scorer.collator, args.prompt_template, args.max_length)
        self.run.remember_weights(self.model, self.scorer.first_values)
        self.method_loss = StepLoss(self.model, self.method, args, self.scorer.num_tokens)
        self.diagnostics = {"train": Diagnostics(), "eval": Diagnostics()}
        self.add_callback(_TeacherHooks(self))
        self.add_callback(ClipWarning())

    @property
    def teacher(self):
        """The teacher's weights, see `teacher.weights.Teacher`."""
        return self.scorer.teacher

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, also where the processing class is a processor."""
        return getattr(self.processing_class, "tokenizer", self.processing_class)

    @property
    def mode(self) -> str:
        """ "train" or "eval"."""
        return "train" if self.model.training else "eval"

    def check_before_training(self) -> None:
        check_fills_a_batch(self.args, self.train_dataset)

    def train(self, *args, **kwargs):
        """See `CheckedTrainer.train`."""
        output = super().train(*args, **kwargs)
        check_trained(self.state)
        return output

    def save_extra_state(self, checkpoint: str) -> None:
        self.scorer.save(checkpoint, with_head=False)

    def load_extra_state(self, checkpoint: str) -> None:
        self.scorer.load(checkpoint)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The divergence from student to teacher on the positions whose labels are not -100.

        Args:
            model: the student, as the engine wraps it.
            inputs: a batch of `MessagesCollator`, sampled or not.
            return_outputs: return a pair, whose second part has no logits.
            num_items_in_batch: not read; see the class.
        """
        diagnostics, device = self.diagnostics[self.mode], self.accelerator.device
        predicts, mask, completions = self._distilled(inputs)
        with diagnostics.clock("teacher_forward", device):
            target = self._score(inputs, completions, mask)
        with diagnostics.clock("loss", device):
            function = self._loss_from_states(predicts, mask, target)
            loss, stats = self.method_loss.in_forward(model, inputs["input_ids"], inputs["attention_mask"], function)
        products = stats.pop("clip_products", None)
        values = {name: value.new_zeros(mask.shape).masked_scatter(mask, value) for name, value in stats.items()}
        diagnostics.add(values, mask, torch.arange(len(mask), device=device), clip_products=products)
        return (loss, {"loss": loss}) if return_outputs else loss

    def _distilled(self, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
        """Where the states that predict distilled tokens are (B, S - 1), the same by place in the rollout (B, D), and
        the rollouts' ids; both masks select the same tokens in the same order."""
        own, args = inputs["labels"] != IGNORED, self.args
        length = args.distillation_length_at(self.state.global_step if self.mode == "train" else None)
        completions = [ids[is_own].tolist()[:length] for ids, is_own in zip(inputs["input_ids"], own, strict=True)]
        width, place = max(1, *map(len, completions)), own.cumsum(dim=1) - 1
        kept = own & (place >= args.num_loss_tokens_to_skip) & (place < width)
        rows, columns = kept.nonzero(as_tuple=True)
        mask = torch.zeros(len(own), width, dtype=torch.bool, device=own.device)
        mask[rows, place[rows, columns]] = True
        return kept[:, 1:], mask, completions

    def _score(self, inputs: dict[str, Any], completions: list[list[int]], mask: torch.Tensor) -> TargetStates:
        """Teacher hidden states (B, D, H) of the rollouts."""
        moment = Moment(random.Random(self.args.seed), self.state.global_step)
        rows = list(zip(inputs["question"], inputs["solution"], completions, strict=True))
        groups = [
            self.method.contexts([Rollout(question, solution, "")], self.args, moment) for question, solution, _ in rows
        ]
        contexts = [views if ids else () for (views,), ids in zip(groups, completions, strict=True)]
        prompts = [(question, question) for question, _, _ in rows]
        self.scorer.encoder.forget()
        target, _ = self.scorer.score(contexts, prompts, completions, mask.shape, mode=self.mode)
        # Inside HF Trainer's autocast the teacher's weights, cast without a gradient, would be the student's too.
        torch.clear_autocast_cache()
        return target

    def _loss_from_states(self, predicts: torch.Tensor, mask: torch.Tensor, states: TargetStates):
        items = mask.sum() if self.args.loss_reduction == "token" else mask.any(dim=1).sum()
        items = self.accelerator.reduce(items.float()[None], reduction="sum")[0]
        # Engines average gradients over ranks, so each rank divides by its share of the global count.
        denominator = items.clamp(min=1) / self.accelerator.num_processes
        weights = token_weights(mask, reduction=self.args.loss_reduction, denominator=denominator)
        step = self.state.global_step
        target = Target(states.anchor[mask], None, self.method.shape(self.args, step), self.scorer.heads[self.mode])
        measures_clip = self.mode == "train" and step == 0
        own = LossColumns.of_divergence(weights[mask])

        def function(hidden: torch.Tensor, head: OutputHead):
            states = hidden[:, :-1][predicts]
            return self.method_loss.of_states(states, head, target, own, None, measures_clip=measures_clip)

        return function

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's numbers and ours; collective."""
        diagnostics, prefix = self.diagnostics[self.mode], {"train": "", "eval": "eval_"}[self.mode]
        means = diagnostics.means(lambda sums: self.accelerator.reduce(sums, reduction="sum"), self.accelerator.device)
        means |= {f"time/{name}": seconds for name, seconds in diagnostics.seconds().items()}
        diagnostics.reset()
        super().log({**logs, **{f"{prefix}{name}": value for name, value in means.items()}}, start_time)


class _TeacherHooks(TrainerCallback):
    """Moves the teacher's average."""

    def __init__(self, trainer: OPSDGKDTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.accelerator.print(describe_run(args, self.trainer.method))

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.teacher.update()
