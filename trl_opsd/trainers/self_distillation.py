# SPDX-License-Identifier: Apache-2.0
"""The trainer of every method: TRL samples and verifies, the teacher scores, the loss is taken from hidden states.

One generation batch: rows -> rollouts and rewards (TRL) -> contexts (`method`) -> teacher hidden states (B, D, H) ->
TRL shuffles and splits -> micro-batches -> student hidden states -> fused loss. No formula stands here.
"""

from collections import Counter
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from ..card import describe_run
from ..card.publishing import Publisher
from ..checkpoints.initial_weights import check_initial_weights, fingerprint
from ..checkpoints.state import load_head, save_head
from ..losses import OutputHead, token_weights
from ..losses.tiles import nonzero_positions
from ..model.checks import num_positions
from ..model.heads import head_function
from ..monitoring.accuracy_guard import AccuracyGuard
from ..monitoring.diagnostics import Diagnostics
from ..monitoring.guard import LIMITS, ClipWarning, CollapseGuard
from ..rewards import guard_rewards
from ..teacher.prompts import TeacherCollator
from ..teacher.scoring import ContextSharing
from ..teacher.states import offload_states, read_target
from ..teacher.weights import Teacher
from .checks import check_inputs, check_sampling_keeps_weights, choose_reward, warn_of_first_golds
from .config import OPSDConfig
from .prompt_checks import check_prompts
from .rollout_text import rollouts_text
from .runs import IdentifiedRun
from .targets import TargetTrainer


class SelfDistillationTrainer(IdentifiedRun, TargetTrainer):
    """GRPOTrainer whose loss is the divergence to a privileged self on the student's own rollouts.

    Takes every argument of `trl.GRPOTrainer`. `reward_funcs` may be left out: then answers are verified with
    `verifier` for the log where the solutions hold one. Datasets have the columns `prompt` (text, or a conversation
    that ends with a user turn) and `solution` (the reference).

    Subclasses set `method` and `config_class`.

    Raises:
        ValueError: before any training, for a dataset, model or setting the method cannot work with.
    """

    config_class = OPSDConfig

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        reward_processing_classes=None,
        callbacks=None,
        optimizers=(None, None),
        quantization_config=None,
        peft_config=None,
        tools=None,
        rollout_func=None,
        environment_factory=None,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or self.config_class(f"{name.rstrip('/').split('/')[-1] or 'model'}-{self.method.name}")
        check_inputs(self.method, self.config_class, model, args, train_dataset, eval_dataset)
        if isinstance(model, str):  # a pickle can run code when it is read
            args.model_init_kwargs = {"use_safetensors": True, **(args.model_init_kwargs or {})}
        self._reward_errors: Counter[str] = Counter()
        rewards = choose_reward(self.method, reward_funcs, train_dataset, args.verifier)
        super().__init__(
            model=model,
            reward_funcs=guard_rewards(rewards, args.reward_errors, self._reward_errors),
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
            rollout_func=rollout_func,
            environment_factory=environment_factory,
        )
        self.prepare_model_to_teach()
        check_sampling_keeps_weights(self.model, args)
        self.collator = self._make_collator()
        check_prompts(self.collator, train_dataset, eval_dataset, self.first_rows())
        warning = None if reward_funcs else warn_of_first_golds(train_dataset, args.verifier)
        if warning is not None:
            self._tell(warning)
        self._start(fresh_adapter=peft_config is not None)

    # Set-up

    def _start(self, *, fresh_adapter: bool) -> None:
        """Make the teacher and empty logs."""
        args = self.args
        self.teacher = Teacher(
            args.teacher_model_kind,
            self.model,
            fresh_adapter=fresh_adapter,
            update_rate=args.teacher_update_rate,
            keep_head=self._updates_per_generation() > 1,
        )
        self.remember_initial_weights()
        self.num_tokens = len(self.tokenizer) if getattr(args, "real_tokens_only", False) else None
        self.divergence = args.loss_divergence()
        self.diagnostics = {"train": Diagnostics(), "eval": Diagnostics()}
        self._sharing = ContextSharing()
        # One for each mode: an evaluation must not change a pending batch's.
        self._target_heads: dict[str, OutputHead | None] = {"train": None, "eval": None}
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._prompt_texts: list[str] = []
        self._group_labels: Counter[str] = Counter()
        self._unsplit_batches = 0
        self.publisher = Publisher(self)
        self.add_callback(self.publisher)
        self.add_callback(_StepHooks(self))
        self.add_callback(ClipWarning())
        if args.guard != "off":
            planned = self._planned_changes()
            self.add_callback(CollapseGuard(args.guard, [limit for limit in LIMITS if limit.key not in planned]))
            self.add_callback(AccuracyGuard(args.guard, watches_rewards="reward" not in planned))

    def _planned_changes(self) -> set[str]:
        """Logged numbers that change by plan, which the guard is not to take for a collapse."""
        args, planned = self.args, set()
        if self.method.shape(args, 0) != self.method.shape(args, args.max_steps):  # OGLS-SD's lambda
            planned.add("divergence")
        if args.distillation_length_start is not None:
            planned |= {"divergence", "student_entropy"}  # of other positions
            planned |= {"completions/mean_length", "reward"} if args.sample_distilled_only else set()
        return planned

    def _make_collator(self) -> TeacherCollator:
        positions = num_positions(self.model.config)
        return TeacherCollator.from_settings(self.tokenizer, self.args, self.render_kwargs(), max_positions=positions)

    def _updates_per_generation(self) -> int:
        args = self.args
        return args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations

    def train(self, *args, **kwargs):
        """See `IdentifiedRun.train`."""
        output = super().train(*args, **kwargs)
        self.publisher.warn_of_failed_pushes()
        return output

    # Hooks of RolloutTrainer

    def add_targets(self, rows, batch, rewards, rollout_ids) -> dict[str, Any]:
        if self.args.reward_errors == "skip":
            counts = torch.tensor([float(self._reward_errors[name]) for name in self.reward_func_names])
            counts = self.accelerator.reduce(counts.to(self.accelerator.device), reduction="sum").tolist()
            names = [f"rewards/{name}/errors" for name in self.reward_func_names]
            self.add_metrics(dict(zip(names, counts, strict=True)))
            self._reward_errors.clear()
        return super().add_targets(rows, batch, rewards, rollout_ids)

    def prepare_micro_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        places = {"distilled_positions": nonzero_positions(batch["distillation_mask"])}
        return places | (offload_states(batch) if self.args.offload_targets else {})

    def count_loss_items(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        mask = batch["distillation_mask"]
        items = mask.sum() if self.args.loss_reduction == "token" else mask.any(dim=1).sum()
        return {"num_loss_items": items}

    def step_loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        diagnostics = self.diagnostics[self.mode]
        aux_loss = getattr(self, "aux_loss_enabled", False)
        with diagnostics.clock("loss", self.accelerator.device):
            if self.args.reward_weight > 0 or aux_loss:
                loss, stats = self._mixed_loss(model, batch)
            else:
                loss, stats = self._distillation_loss(model, batch)
        mask, clip_products = batch["distillation_mask"], stats.pop("clip_products", None)
        values = {name: value.view(mask.shape) for name, value in stats.items()}
        diagnostics.add(values, mask, batch["rollout_index"], clip_products, batch["rollout_outcome"])
        if self.mode == "train":
            self._losses.append((loss.detach(), batch["rollout_index"]))
        return loss

    def save_extra_state(self, checkpoint: str) -> None:
        self.teacher.save(checkpoint)
        head = self._target_heads["train"]
        if head is not None and self.has_pending_batch() and self.args.should_save:  # the same on every rank
            save_head(checkpoint, {field.name: getattr(head, field.name) for field in fields(head)})

    def load_extra_state(self, checkpoint: str) -> None:
        self.teacher.load(checkpoint)
        head = load_head(checkpoint, self.accelerator.device)
        self._target_heads["train"] = None if head is None else OutputHead(**head)

    def pending_values(self) -> dict[str, Any]:
        return {
            "prompt_texts": self._prompt_texts,
            "group_labels": self._group_labels,
            "unsplit_batches": self._unsplit_batches,
            "diagnostics": self.diagnostics["train"].state(),
        }

    def restore_pending_values(self, values: dict[str, Any]) -> None:
        if values.get("base_teacher"):  # of a run that began before markers held more of it
            check_initial_weights({"old": fingerprint(self.teacher.values)}, {"old": values["base_teacher"]})
        self._prompt_texts = values["prompt_texts"]
        self._group_labels = Counter(values["group_labels"])
        self._unsplit_batches = values["unsplit_batches"]
        self.diagnostics["train"].restore(values["diagnostics"], self.accelerator.device)

    # Loss

    def _loss_from_states(self, batch: dict[str, Any]):
        """The function that a forward of the student calls with its hidden states and head."""
        mask, target_head = batch["distillation_mask"], self._target_heads[self.mode]
        weights = token_weights(
            mask,
            reduction=self.args.loss_reduction,
            # Engines average gradients over ranks, so each rank divides by its share of the global count.
            denominator=batch["num_loss_items"].clamp(min=1) / self.accelerator.num_processes,
        )
        first = batch["prompt_ids"].size(1) - 1

        def function(hidden: torch.Tensor, head: OutputHead):
            states = hidden[:, first : first + mask.size(1)].flatten(0, 1)
            target = read_target(batch, self.shape_now(), target_head, mask.device)
            return self.divergence_of(states, head, target, weights.flatten(), batch.get("distilled_positions"))

        return function

    def _distillation_loss(self, model: torch.nn.Module, batch: dict[str, Any]):
        length = batch["distillation_mask"].size(1)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"][:, :length]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"][:, :length]], dim=1)
        return self.loss_in_forward(model, ids, mask, self._loss_from_states(batch))

    def _mixed_loss(self, model: torch.nn.Module, batch: dict[str, Any]):
        """Distillation plus TRL's policy-gradient loss (and a router's loss) from one student forward."""
        with head_function(self.model, self._loss_from_states(batch), keep_forward=True) as request:
            cached = self.policy_logps(model, batch)
        loss, stats = request.result
        if self.args.reward_weight > 0:
            loss = loss + self.args.reward_weight * self.policy_loss(model, batch, cached)
        elif cached[2] is not None:
            steps = self.current_gradient_accumulation_steps if self.mode == "train" else 1
            loss = loss + self.router_aux_loss_coef * cached[2] / steps
        return loss, stats

    def check_finite_loss(self) -> None:
        """Stop on NaN or inf in the loss of the current step.

        Raises:
            FloatingPointError: names the step and the rows of the micro-batch.
        """
        losses, self._losses = self._losses, []
        if not losses or bool(torch.stack([loss for loss, _ in losses]).isfinite().all()):
            return
        first = self.accelerator.process_index * len(self._prompt_texts)
        bad = [index - first for loss, rows in losses if not loss.isfinite() for index in rows.tolist()]
        raise FloatingPointError(
            f"The loss is not finite at step {self.state.global_step} for the rows with prompts "
            f"{[self._prompt_texts[index] for index in sorted(set(bad))]}. The weights of earlier checkpoints are "
            "untouched. Lower learning_rate or max_grad_norm, or look at these rows."
        )

    # Logs and files

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's numbers and ours; collective."""
        diagnostics = self.diagnostics[self.mode]
        device = self.accelerator.device
        self.add_metrics(diagnostics.means(lambda sums: self.accelerator.reduce(sums, reduction="sum"), device))
        self.add_metrics({f"time/{name}": seconds for name, seconds in diagnostics.seconds().items()})
        self.fill_table_column("divergence", diagnostics.row_divergences())
        diagnostics.reset()
        shown, self.num_completions_to_print = self.num_completions_to_print, 0  # TRL saves its table and prints none
        try:
            super().log(logs, start_time)
        finally:
            self.num_completions_to_print = shown
        if self.log_completions and self.accelerator.is_main_process:
            print(rollouts_text(self.table_rows(), self.state.global_step, shown), end="", flush=True)

    def create_model_card(self, model_name=None, dataset_name=None, tags=None, evaluation=None) -> None:
        """Write README.md and run.png into the output directory: method, settings, results, data, hardware, limits.

        Args:
            model_name: title of the card; the output directory's name if None.
            dataset_name: of the Hub; a later card keeps it.
            tags: added to the metadata.
            evaluation: numbers of base and model, see `trl_opsd.card.results_section`; a later card of the same weights
                keeps them.
        """
        self.publisher.dataset_name = dataset_name or self.publisher.dataset_name
        super().create_model_card(model_name=model_name, dataset_name=self.publisher.dataset_name, tags=tags)
        if evaluation is not None:
            self.publisher.keep_evaluation(evaluation)
        self.publisher.write_card()

    def push_to_hub(self, commit_message="End of training", blocking=True, token=None, revision=None, **kwargs):
        """Upload model, tokenizer and card.

        Args:
            commit_message: of the commit.
            blocking: False returns a future at once.
            token: other than the one of `hf auth login`.
            revision: branch; the default one if None.
            kwargs: for `create_model_card`.

        Returns:
            `CommitInfo` or a future of it; None on other processes than the first.

        Raises:
            RuntimeError: the upload failed; says where the model is and how to upload it.
        """
        begin = partial(super().push_to_hub, commit_message, blocking=False, token=token, revision=revision, **kwargs)
        upload = begin()
        return self.publisher.finish(upload, begin) if blocking and upload is not None else upload


class _StepHooks(TrainerCallback):
    """Work at the boundaries of an optimizer step."""

    def __init__(self, trainer: SelfDistillationTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.accelerator.print(describe_run(args, self.trainer.method))
        self.trainer.restore_interval()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_finite_loss()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.check_finite_loss()  # DeepSpeed steps inside its backward, before the hook above
        if state.global_step % args.teacher_sync_steps == 0:
            lost = self.trainer.teacher.update()
            if args.teacher_model_kind == "ema":
                self.trainer.add_metrics({"teacher/ema_rank_loss": lost})
