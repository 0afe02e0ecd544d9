# SPDX-License-Identifier: Apache-2.0
"""The trainer of every method: TRL samples and verifies, the teacher scores, the loss is taken from hidden states.

One generation batch: rows -> rollouts and rewards (TRL) -> contexts (`method`) -> teacher hidden states (B, D, H) ->
TRL shuffles and splits -> micro-batches -> student hidden states -> fused loss. No formula stands here.
"""

import random
import warnings
from collections import Counter
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import AutoConfig, TrainerCallback

from .._trl import RolloutTrainer, trusts_remote_code
from ..card import append_method_section
from ..collators import TeacherCollator, positions_from_mask
from ..config import OPSDConfig
from ..contexts import Contexts, Rollout, fill_template, rewrite_last_turn
from ..diagnostics import Diagnostics
from ..heads import OutputHead, attach_head_function, check_output_head, head_function, head_shape
from ..losses import fused_divergence, token_weights
from ..markers import count_markers
from ..methods import Method
from ..rewards import accuracy_reward, no_reward
from ..scoring import ScoringJob, completion_states, score_contexts
from ..teacher import Teacher
from ..validation import check_dataset, check_model_config, check_rows, check_vocabulary
from ..verification import verifies

_ROWS_TO_VERIFY = 32
_BATCHES_TO_WARN = 10


class SelfDistillationTrainer(RolloutTrainer):
    """GRPOTrainer whose loss is the divergence to a privileged self on the student's own rollouts.

    Takes every argument of `trl.GRPOTrainer`. `reward_funcs` may be left out: then answers are verified with
    math-verify for the log where the solutions hold one. Datasets have the columns `prompt` (text, or a conversation
    that ends with a user turn) and `solution` (the reference).

    Subclasses set `method` and `config_class`.

    Raises:
        ValueError: before any training, for a dataset, model or setting the method cannot work with.
    """

    method: Method
    config_class = OPSDConfig

    def __init__(
        self,
        model,
        reward_funcs=None,
        args=None,
        train_dataset=None,
        eval_dataset=None,
        processing_class=None,
        *positional,
        peft_config=None,
        **keywords,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or self.config_class(f"{name.rstrip('/').split('/')[-1] or 'model'}-{self.method.name}")
        self._check_inputs(model, args, train_dataset, eval_dataset)
        reward_funcs = reward_funcs or _monitoring_reward(train_dataset)
        if self.method.needs_reward and reward_funcs is no_reward:
            raise ValueError(
                f"reward_funcs is not given and no `solution` of the first rows holds an answer to verify, but "
                f"{self.method.name} needs to know which rollouts are right. Pass a reward function."
            )
        super().__init__(
            model,
            reward_funcs,
            args,
            train_dataset,
            eval_dataset,
            processing_class,
            *positional,
            peft_config=peft_config,
            **keywords,
        )
        check_model_config(self.model.config)
        self._check_softcap()
        attach_head_function(self.model)
        head_rows, self.hidden_size = head_shape(self.model)
        check_vocabulary(self.model.config, head_rows, len(self.tokenizer))
        self.num_tokens = len(self.tokenizer) if getattr(args, "real_tokens_only", False) else None
        self.collator = self._make_collator()
        for dataset in (train_dataset, *(eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset])):
            if dataset is not None:
                self._check_budgets(dataset)
        self.teacher = Teacher(
            args.teacher_model_kind,
            self.model,
            fresh_adapter=peft_config is not None,
            update_rate=args.teacher_update_rate,
            keep_head=self._updates_per_generation() > 1,
        )
        self.divergence = args.loss_divergence()
        self.diagnostics = {"train": Diagnostics(), "eval": Diagnostics()}
        self._head_checked = False
        self._losses: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._prompt_texts: list[str] = []
        self._group_labels: Counter[str] = Counter()
        self._unsplit_batches = 0
        self.add_callback(_StepHooks(self))

    # Set-up

    def _check_inputs(self, model, args, train_dataset, eval_dataset) -> None:
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"args is a {type(args).__name__}; {type(self).__name__} needs a {self.config_class.__name__}. It takes "
                "the same fields and more."
            )
        if train_dataset is None:
            raise ValueError("train_dataset is None; give a dataset with the columns `prompt` and `solution`.")
        needs_solution = self.method.needs_solution
        check_dataset(train_dataset, "train_dataset", needs_solution=needs_solution)
        if eval_dataset is not None:
            check_dataset(eval_dataset, "eval_dataset", needs_solution=needs_solution)
        config = model.config if not isinstance(model, str) else _load_config(model, args)
        check_model_config(config)

    def _check_softcap(self) -> None:
        config = self.model.config.get_text_config()
        if self.method.shape(self.args, 0).uses_direction and getattr(config, "final_logit_softcapping", None):
            raise ValueError(
                f"model: {config.model_type} caps its logits, so {self.method.name}'s views cannot be added as hidden "
                "states yet. Use OPSD with this model, or a model without a cap."
            )

    def _make_collator(self) -> TeacherCollator:
        args = self.args
        return TeacherCollator(
            tokenizer=self.tokenizer,
            templates={"teacher": args.teacher_prompt_template, "reference": args.reference_prompt_template},
            student_kwargs=args.chat_template_kwargs or {},
            teacher_kwargs=args.teacher_chat_template_kwargs or {},
            prefix=args.teacher_prefix,
            max_length=args.max_teacher_prompt_length,
            shorten=args.solution_shortening,
            render_kwargs=self.render_kwargs(),
        )

    def _check_budgets(self, dataset) -> None:
        """Render one row with every template, and every row whose problem could exhaust the budget."""
        limit = self.args.max_teacher_prompt_length
        rows = [next(iter(dataset))]
        self.collator.check_renders(rows[0]["prompt"])
        if limit is not None and hasattr(dataset, "__len__"):
            # A token is at least one byte, so only a prompt with more bytes than this may fail to fit.
            bytes_that_fit = limit - self.collator.template_length()
            rows += [
                row for row in dataset.select_columns("prompt") if len(str(row["prompt"]).encode()) > bytes_that_fit
            ]
        for row in rows:
            for template in self.collator.templates:
                self.collator.check_budget(row["prompt"], template)

    def _updates_per_generation(self) -> int:
        args = self.args
        return args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations

    # Hooks of RolloutTrainer

    def prepare_rows(self, rows: list[dict]) -> list[dict]:
        check_rows(rows, "generation batch", needs_solution=self.method.needs_solution)
        template = self.args.prompt_template
        if template is None:
            return rows
        self._raw_prompts = [row["prompt"] for row in rows]
        return [
            {**row, "prompt": rewrite_last_turn(row["prompt"], lambda text: fill_template(template, prompt=text))}
            for row in rows
        ]

    def add_targets(self, rows: list[dict], batch: dict[str, Any], rewards: torch.Tensor) -> dict[str, Any]:
        batch_size = len(rows)
        first = self.accelerator.process_index * batch_size
        texts = self.tokenizer.batch_decode(self._completion_lists(batch), skip_special_tokens=True)
        prompts = [row["prompt"] for row in rows] if self.args.prompt_template is None else self._raw_prompts
        rollouts = [
            Rollout(prompt, row.get("solution"), text, reward)
            for prompt, row, text, reward in zip(
                prompts, rows, texts, self._scalar_rewards(rewards)[first : first + batch_size], strict=True
            )
        ]
        contexts = self._contexts(rollouts)
        mask = self._distilled_mask(batch, contexts)
        target, shortened = self._score(rows, rollouts, contexts, batch, mask.size(1))
        batch["anchor_hidden"], batch["distillation_mask"] = target.anchor, mask
        if target.direction is not None:
            batch["direction_hidden"] = target.direction
        batch["rollout_index"] = torch.arange(first, first + batch_size, device=mask.device)
        self._prompt_texts = [str(prompt)[:80] for prompt in prompts]
        self._log_rollouts(batch, texts, shortened)
        return batch

    def count_loss_items(self, batch: dict[str, Any]) -> torch.Tensor:
        mask = batch["distillation_mask"]
        return mask.sum() if self.args.loss_reduction == "token" else mask.any(dim=1).sum()

    def step_loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        diagnostics = self.diagnostics[self.mode]
        aux_loss = getattr(self, "aux_loss_enabled", False)
        with diagnostics.clock("loss", self.accelerator.device):
            if self.args.reward_weight > 0 or aux_loss:
                loss, stats = self._mixed_loss(model, batch)
            else:
                loss, stats = self._distillation_loss(model, batch)
        mask = batch["distillation_mask"]
        values = {name: value.view(mask.shape) for name, value in stats.items()}
        diagnostics.add(values, mask, batch["rollout_index"])
        if self.mode == "train":
            self._losses.append((loss.detach(), batch["rollout_index"]))
        return loss

    def save_extra_state(self, checkpoint: str) -> None:
        self.teacher.save(checkpoint)

    def load_extra_state(self, checkpoint: str) -> None:
        self.teacher.load(checkpoint)

    # Scoring

    def _contexts(self, rollouts: list[Rollout]) -> list[Contexts]:
        """Teacher contexts of the local rollouts; a group may have members on several ranks."""
        size = self.num_generations if self.mode == "train" else self.num_generations_eval
        own = range(len(rollouts))
        if self.method.needs_group:
            own = range(
                len(rollouts) * self.accelerator.process_index, len(rollouts) * (self.accelerator.process_index + 1)
            )
            rollouts = gather_object(rollouts)
        else:
            size = 1
        draw = random.Random(f"{self.args.seed}/{self.state.global_step}")  # the same on every rank
        groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
        contexts = [views for group in groups for views in self.method.contexts(group, self.args, draw)]
        if self.method.label is not None:
            self._log_groups([self.method.label(group, self.args) for group in groups], contexts, size)
        return [contexts[index] for index in own]

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

    def _completion_lists(self, batch: dict[str, Any]) -> list[list[int]]:
        lengths = batch["completion_mask"].sum(1).tolist()
        return [ids[:length] for ids, length in zip(batch["completion_ids"].tolist(), lengths, strict=True)]

    def _scalar_rewards(self, rewards: torch.Tensor) -> list[float | None]:
        """One weighted reward per rollout of the world's batch, None where no function gave one."""
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(dim=1)
        total[rewards.isnan().all(dim=1)] = torch.nan
        return [None if value != value else value for value in total.tolist()]

    def _distilled_mask(self, batch: dict[str, Any], contexts: list[Contexts]) -> torch.Tensor:
        """(B, D), 1 on the positions of a rollout that are distilled: its own tokens, never a tool's."""
        mask = batch["completion_mask"]
        mask = mask * batch["tool_mask"] if "tool_mask" in batch else mask.clone()
        mask = mask[:, : self.args.distillation_length]
        mask[:, : self.args.num_loss_tokens_to_skip] = 0
        mask[torch.tensor([not views for views in contexts], device=mask.device)] = 0
        return mask

    def _score(self, rows, rollouts, contexts, batch, length):
        """Teacher hidden states of the batch, and per rollout whether its context was shortened."""
        jobs, shortened, encoded = [], [False] * len(rollouts), {}
        ids = [completion[:length] for completion in self._completion_lists(batch)]
        for row, views in enumerate(contexts):
            for view in views if ids[row] else ():
                prompt = rows[row]["prompt"] if view.template == "plain" else rollouts[row].prompt
                key = (str(prompt), view.template, view.slot)
                if key not in encoded:
                    encoded[key] = self.collator.encode(prompt, view)
                shortened[row] |= encoded[key].shortened
                jobs.append(ScoringJob(encoded[key].ids, ids[row], row, view.anchor, view.direction))
        with self.diagnostics[self.mode].clock("teacher_forward", self.accelerator.device):
            return self._run_teacher(jobs, (len(rollouts), length, self.hidden_size)), shortened

    def _run_teacher(self, jobs: list[ScoringJob], shape: tuple[int, int, int]):
        device = self.accelerator.device

        def run(ids, mask, length):
            return completion_states(self.model, self.model, ids, mask, length, self.teacher.observe_head)

        def max_over_ranks(count):
            return int(self.accelerator.gather(torch.tensor([count], device=device)).max())

        with self.teacher.active(), self.accelerator.autocast():
            if not self._head_checked:
                check_output_head(
                    self.model, self.model, torch.tensor([[self.tokenizer.eos_token_id] * 4], device=device)
                )
                self._head_checked = True
            return score_contexts(
                run,
                jobs,
                shape=shape,
                dtype=torch.promote_types(self.model.dtype, torch.float32),
                device=device,
                pad_id=self.tokenizer.pad_token_id,
                tokens_per_forward=self.args.teacher_tokens_per_forward,
                with_direction=self.method.shape(self.args, 0).uses_direction,
                max_over_ranks=max_over_ranks,
            )

    # Loss

    def _loss_from_states(self, batch: dict[str, Any]):
        """The function that a forward of the student calls with its hidden states and head."""
        mask, target_head = batch["distillation_mask"], self.teacher.head
        weights = token_weights(
            mask,
            reduction=self.args.loss_reduction,
            # Engines average gradients over ranks, so each rank divides by its share of the global count.
            denominator=batch["num_loss_items"].clamp(min=1) / self.accelerator.num_processes,
        )
        first = batch["prompt_ids"].size(1) - 1
        direction = batch.get("direction_hidden")

        def function(hidden: torch.Tensor, head: OutputHead):
            states = hidden[:, first : first + mask.size(1)]
            return fused_divergence(
                states.flatten(0, 1),
                head.weight,
                batch["anchor_hidden"].flatten(0, 1),
                None if direction is None else direction.flatten(0, 1),
                token_weights=weights.flatten(),
                divergence=self.divergence,
                shape=self.method.shape(self.args, self.state.global_step),
                head_bias=head.bias,
                target_head_weight=None if target_head is None else target_head.weight,
                target_head_bias=None if target_head is None else target_head.bias,
                logit_scale=head.logit_scale,
                logit_softcap=head.logit_softcap,
                num_tokens=self.num_tokens,
            )

        return function

    def _distillation_loss(self, model: torch.nn.Module, batch: dict[str, Any]):
        length = batch["distillation_mask"].size(1)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"][:, :length]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"][:, :length]], dim=1)
        with head_function(self.model, self._loss_from_states(batch)) as request:
            output = model(input_ids=ids, attention_mask=mask, position_ids=positions_from_mask(mask))
        # The loss that came through the engine's forward, not the one inside it: output hooks may have wrapped it.
        return output["loss"], _named(request.result[1])

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
        return loss, _named(stats)

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

    def _log_rollouts(self, batch, texts, shortened) -> None:
        lengths = batch["completion_mask"].sum(1).tolist()
        markers = [count_markers(text, self.args.reflection_markers) for text in texts]
        sums = torch.tensor([sum(markers), sum(lengths), sum(shortened), len(texts)], dtype=torch.float64)
        sums = self.accelerator.reduce(sums.to(self.accelerator.device), reduction="sum").tolist()
        self.add_metrics(
            {
                "reflection_markers_per_1000": 1000 * sums[0] / max(sums[1], 1),
                "teacher/solution_shortened": sums[2] / sums[3],
            }
        )
        self.add_table_column("divergence", [float("nan")] * len(texts))
        self.add_table_column("reflection_markers", markers)
        self.add_table_column("solution_shortened", shortened)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log TRL's numbers and ours; collective."""
        diagnostics = self.diagnostics[self.mode]
        device = self.accelerator.device
        self.add_metrics(diagnostics.means(lambda sums: self.accelerator.reduce(sums, reduction="sum"), device))
        self.add_metrics({f"time/{name}": seconds for name, seconds in diagnostics.seconds().items()})
        self.fill_table_column("divergence", diagnostics.row_divergences())
        diagnostics.reset()
        super().log(logs, start_time)

    def create_model_card(self, *args, **kwargs) -> None:
        """TRL's model card with a section on the method: teacher, prompts, thinking modes and settings."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            append_method_section(self.args, self.method)


class _StepHooks(TrainerCallback):
    """Work at the boundaries of an optimizer step."""

    def __init__(self, trainer: SelfDistillationTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_finite_loss()

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.check_finite_loss()  # DeepSpeed steps inside its backward, before the hook above
        if state.global_step % args.teacher_sync_steps == 0:
            lost = self.trainer.teacher.update()
            if args.teacher_model_kind == "ema":
                self.trainer.add_metrics({"teacher/ema_rank_loss": lost})


def _monitoring_reward(dataset):
    """Accuracy where the solutions hold an answer, else a zero that TRL needs to be there."""
    rows = [row for _, row in zip(range(_ROWS_TO_VERIFY), dataset, strict=False)]
    solutions = [row.get("solution") for row in rows]
    return accuracy_reward if any(s is not None and verifies(s) for s in solutions) else no_reward


def _load_config(model: str, args):
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusts_remote_code(args))


def _named(stats) -> dict[str, torch.Tensor]:
    """The kernel's diagnostics under the names of the log."""
    return {
        "divergence": stats.unclipped,
        "clipped_share": stats.clipped_share,
        "student_entropy": stats.student_entropy,
        "target_entropy": stats.target_entropy,
        "top_token_agreement": stats.top_agreement,
    }
