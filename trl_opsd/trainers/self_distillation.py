# SPDX-License-Identifier: Apache-2.0
"""The trainer of every method: TRL samples and verifies, the teacher scores, the loss is taken from hidden states.

One generation batch: rows -> rollouts and rewards (TRL) -> contexts (`method`) -> what the teacher says of them (`Scorer`)
-> TRL shuffles and splits -> micro-batches -> student hidden states -> loss (`StepLoss`). No formula stands here.
"""

import math
import random
from collections import Counter
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback

from .._trl.rollouts import RolloutTrainer, student_inputs
from .._trl.versions import adds_up_over_rows
from ..card import describe_run
from ..card.publishing import Publisher
from ..checkpoints.initial_weights import check_initial_weights, fingerprint
from ..losses import SignalDecomposition
from ..methods import OPSD, Method
from ..methods.controls import controlled, with_other_solutions
from ..methods.privileged import PrivilegedText
from ..model.heads import head_function
from ..monitoring.diagnostics import Diagnostics
from ..monitoring.finite import FiniteLosses
from ..rewards import guard_rewards, no_reward
from ..teacher.contexts import Moment, views_text
from .checks import (
    check_answers,
    check_fills_a_batch,
    check_inputs,
    check_sampling_keeps_weights,
    check_trained,
    choose_reward,
    warn_of_first_golds,
)
from .columns import LossColumns
from .config import OPSDConfig
from .engine_check import EngineCheck
from .groups import GroupReader
from .guards import guards_of
from .lengths import by_length
from .micro_batch import MicroBatchLoss, count_items, distilled_mask, positions
from .prompt_checks import check_prompts
from .reward_log import count_errors, scalar_rewards
from .rollout_log import measure_rollouts, warn_of_masked_rollouts
from .rollout_text import rollouts_text
from .scorer import Scorer
from .step_loss import StepLoss
from .targets import RolloutBatch, TargetMaker
from .tools import check_tool_ranks, check_tools

DECOMPOSED_ROLLOUTS = 8  # per process


class SelfDistillationTrainer(RolloutTrainer):
    """GRPOTrainer whose loss is a method's, from the student's own rollouts and from what a privileged self says of them.

    Takes every argument of `trl.GRPOTrainer`. `reward_funcs` may be left out: then answers are verified with
    `verifier` for the log where the solutions hold one. Datasets have the columns `prompt` (text, or a conversation
    that ends with a user turn) and `solution` (the reference).

    Subclasses set `method` and `config_class`.

    Raises:
        ValueError: before any training, for a dataset, model or setting the method cannot work with.
    """

    method: Method = OPSD
    config_class: type = OPSDConfig

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
        check_answers(self.method, tools=tools, rollout_func=rollout_func, environment_factory=environment_factory)
        self.method = controlled(self.method, args)
        train_dataset = with_other_solutions(train_dataset, args, "train_dataset")
        eval_dataset = with_other_solutions(eval_dataset, args, "eval_dataset")
        if isinstance(model, str):  # a pickle can run code when it is read
            args.model_init_kwargs = {"use_safetensors": True, **(args.model_init_kwargs or {})}
        self._reward_errors: Counter[str] = Counter()
        check_tools(self.method, tools, environment_factory, train_dataset)
        owns_reward = hasattr(environment_factory, "get_reward")  # of an environment's class
        rewards = no_reward if owns_reward and not reward_funcs else None
        rewards = rewards or choose_reward(self.method, reward_funcs, train_dataset, args.verifier)
        super().__init__(
            model=model,
            reward_funcs=guard_rewards(rewards, self._reward_errors),
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
        self._make_parts(train_dataset, eval_dataset, fresh_adapter=peft_config is not None)
        self._tell_at_start(None if reward_funcs or owns_reward else train_dataset)
        self.scorer.make_teacher()
        self.run.remember_weights(self.model, self.scorer.first_values)
        self.method_loss = StepLoss(self.model, self.method, args, self.scorer.num_tokens)
        self._start_logs()

    # Set-up

    def _make_parts(self, train_dataset, eval_dataset, *, fresh_adapter: bool) -> None:
        """Make what encodes and scores, and check the rows with it."""
        args = self.args
        if self.has_tools:
            check_tool_ranks(self.accelerator, args)
        self.scorer = Scorer(
            self.model,
            self.accelerator,
            self.method,
            args,
            self.tokenizer,
            render_kwargs=self.render_kwargs(),
            fresh_adapter=fresh_adapter,
            keep_head=self._updates_per_generation() > 1,
        )
        check_sampling_keeps_weights(self.model, args)
        self.privileged = PrivilegedText(self.method, args)
        check_prompts(self.scorer.collator, train_dataset, eval_dataset, self.first_rows(), self.privileged)

    def _tell_at_start(self, verified: Any) -> None:
        """What a user is to know of the method, and of a dataset whose answers are verified."""
        told = [] if verified is None else [warn_of_first_golds(verified, self.args.verifier)]
        told += [f"{self.method.name} is experimental. {self.method.inferred}"] if self.method.inferred else []
        for text in filter(None, told):
            self.run.tell(text)

    @property
    def teacher(self):
        """The teacher's weights, see `teacher.weights.Teacher`."""
        return self.scorer.teacher

    def _start_logs(self) -> None:
        """Make empty logs and those who read them."""
        self.diagnostics = {"train": Diagnostics(), "eval": Diagnostics()}
        self.groups = GroupReader(self.method, self.args, self.accelerator)
        self.targets = TargetMaker(
            self.scorer,
            self.groups,
            self.args,
            self.tokenizer,
            longest=self.max_completion_length,
            write=self.write_answers,
            reward=self._reward_answers,
            log=self.add_metrics,
            privileged=self.privileged,
            # The check counts a problem once.
            rows_are_checked=hasattr(self.train_dataset, "__len__")
            and (self.args.prompt_template or "").count("{prompt}") <= 1,
        )
        self.engine_check = EngineCheck(self.model, self.accelerator, self.args)
        self.memory: dict[str, Any] = {}
        self._finite = FiniteLosses()
        self._prompt_texts: list[str] = []
        self._batch: RolloutBatch | None = None
        self.publisher = Publisher(self)
        self.add_callback(self.publisher)
        self.add_callback(_StepHooks(self))
        for guard in guards_of(self.method, self.args, grows_rollouts=self._samples_distilled_only()):
            self.add_callback(guard)

    def _updates_per_generation(self) -> int:
        args = self.args
        return args.steps_per_generation // args.gradient_accumulation_steps * args.num_iterations

    def _moment(self) -> Moment:
        step = self.state.global_step
        return Moment(random.Random(f"{self.args.seed}/{step}"), step, self.memory)  # the same on every rank

    def distilled_length(self) -> int | None:
        """Tokens of a rollout that are distilled now, None for all; evaluation takes what training ends with."""
        return self.args.distillation_length_at(self.state.global_step if self.mode == "train" else None)

    def _samples_distilled_only(self) -> bool:
        """Whether sampling stops where a growing distillation does: not where the end of a rollout decides what is trained."""
        reads_ends = self.method.needs_reward or self._has_policy_loss() or self.args.mask_truncated_completions
        return self.args.horizon() is not None and not reads_ends

    # Hooks of CheckedTrainer

    def check_before_training(self) -> None:
        check_fills_a_batch(self.args, self.train_dataset)

    def train(self, *args, **kwargs):
        """See `CheckedTrainer.train`."""
        output = super().train(*args, **kwargs)
        check_trained(self.state)
        self.publisher.warn_of_failed_pushes()
        return output

    def save_extra_state(self, checkpoint: str) -> None:
        self.scorer.save(checkpoint, with_head=self.has_pending_batch() and self.args.should_save)

    def load_extra_state(self, checkpoint: str) -> None:
        self.scorer.load(checkpoint)

    # Hooks of RolloutTrainer: a generation batch

    def prepare_rows(self, rows: list[dict]) -> list[dict]:
        self._batch = self.targets.prepare(rows, self.mode, self._moment())
        if self._samples_distilled_only():
            self.limit_rollouts(self.distilled_length() if self.mode == "train" else None)
        return self._batch.rows

    def before_rewards(self, rows, prompts, completions, rollout_ids) -> None:
        """Have answers verified while the teacher scores, where no context reads a reward, nor what an environment reports."""
        batch = self._batch
        if self.has_environments:
            self.targets.observed(batch, prompts)
        turns = completions if self.has_tools else None
        self.targets.sampled(batch, rollout_ids, self.end_token_ids, turns, self.texts_of(completions))
        begins = [reward.begin for reward in self.reward_funcs if hasattr(reward, "begin")]
        method = self.method
        reads_rewards = method.needs_reward or method.label is not None or method.notes is not None
        reads_rewards |= self.args.teacher_prompt_function is not None or self.has_environments
        if not begins or reads_rewards or self.args.mask_truncated_completions:
            return
        for begin in begins:
            begin(completions, [row.get("solution") for row in rows])
        longest = max(map(len, rollout_ids))
        length = min(longest, self.distilled_length() or longest)
        self._score([len(ids[:length]) > self.args.num_loss_tokens_to_skip for ids in rollout_ids], length)

    def add_targets(self, rows, batch, rewards, rollout_ids) -> dict[str, Any]:
        own, first = self._batch, self.accelerator.process_index * len(rows)
        if self.use_vllm and self.mode == "train":
            self.add_metrics(self.engine_check.check(batch, self.state.global_step))
        self.add_metrics(count_errors(self.reward_func_names, self.reward_funcs, self._reward_errors, self.accelerator))
        self.add_metrics({"rewards/missing": rewards.isnan().all(dim=1).float().mean().item()})
        scalars = scalar_rewards(rewards, self.reward_weights)[first : first + len(rows)]
        self.targets.rewarded(own, scalars, self.environment_reports())
        if own.target is None:
            self._read()
        mask = self._distilled_mask(batch)
        if own.target is None:
            self._score(mask.any(dim=1).tolist(), mask.size(1))
        if self._decomposition_is_due():
            self._log_decomposition(mask.size(1))
        if self.mode == "train":
            self._prompt_texts = gather_object([str(prompt)[:80] for prompt in own.prompts])
            if self.method.remember is not None:
                self.memory = dict(self.method.remember(self.memory, self.targets.seen(own), self.args))
                report = {} if self.method.report is None else self.method.report(self.memory)
                self.add_metrics({f"method/{name}": float(value) for name, value in report.items()})
        self._log_rollouts()
        if self.args.mask_truncated_completions and self.mode == "train":
            warn_of_masked_rollouts(batch["completion_mask"], self.args, self.accelerator)
        return batch | self.targets.columns(own, mask, first)

    def _read(self) -> None:
        size = self.num_generations if self.mode == "train" else self.num_generations_eval
        self.targets.read(self._batch, size, self._moment())

    def _score(self, used: list[bool], length: int) -> None:
        """Have the teacher score; where that is early, the contexts are read first."""
        if not self._batch.contexts:
            self._read()
        with self.diagnostics[self.mode].clock("teacher_forward", self.accelerator.device):
            self.targets.score(self._batch, used, length)

    def _reward_answers(self, rows: list[dict], texts: list[str], ids: list[list[int]]) -> list[float | None]:
        """Weighted rewards of other answers to this rank's rows than their rollouts; a collective."""
        first = self.accelerator.process_index * len(rows)
        rewards = scalar_rewards(self.rewards_of(rows, texts, ids), self.reward_weights)
        return rewards[first : first + len(rows)]

    def _distilled_mask(self, batch: dict[str, Any]) -> torch.Tensor:
        """See `distilled_mask`."""
        length, ignores = self.distilled_length(), self.method.ignored_tokens
        if self.mode == "train" and self.args.horizon() is not None:
            self.add_metrics({"distillation_length": float(length)})
        ignored = ignores(self.tokenizer, self.args) if ignores is not None else set()
        has_views = [bool(views) for views in self._batch.contexts]
        return distilled_mask(batch, length, self.args.num_loss_tokens_to_skip, ignored, has_views)

    # Hooks of RolloutTrainer: a step

    def reads_policy_logps(self) -> bool:
        """Whether old log-probabilities are read: by TRL's loss, or by the method's."""
        corrects_engine = getattr(self.args, "engine_weight_cap", None) is not None
        return self._has_policy_loss() or self.method.reads_old or corrects_engine

    def _has_policy_loss(self) -> bool:
        return self.args.reward_weight > 0 or self.method.advantages is not None

    def _has_router_loss(self) -> bool:
        return getattr(self, "aux_loss_enabled", False)

    def arrange_rows(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        policy, router = self._has_policy_loss(), self._has_router_loss()
        shared_by_ranks = getattr(self.accelerator, "parallelism_config", None) is not None
        return by_length(
            batches,
            # A router's loss is of all the tokens of a forward.
            regroups=not router and (not policy or adds_up_over_rows(self.args)),
            reads_whole=policy or router,
            multiple=getattr(self.args, "pad_to_multiple_of", None) or 1,
            accelerator=self.accelerator if self.mode == "train" and not shared_by_ranks else None,
        )

    def prepare_micro_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return positions(batch, self.method, self.args.steps_per_generation if self.mode == "train" else 1)

    def count_loss_items(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        return count_items(batch, self.method, self.args.loss_reduction)

    def step_loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        diagnostics, of_states = self.diagnostics[self.mode], self._loss_from_states(batch)
        with diagnostics.clock("loss", self.accelerator.device):
            if self._has_policy_loss() or self._has_router_loss():
                loss, stats = self._mixed_loss(model, of_states)
            else:
                ids, mask, _ = student_inputs(batch, of_states.columns.shape[1])
                loss, stats = self.method_loss.in_forward(model, ids, mask, of_states)
        of_states.log(stats, diagnostics)
        if self.mode == "train":
            self._finite.add(loss, batch["rollout_index"])
        return loss

    def _loss_from_states(self, batch: dict[str, Any]) -> MicroBatchLoss:
        columns = LossColumns.of_batch(
            batch,
            self.args,
            num_processes=self.accelerator.num_processes,
            reads_old=self.reads_policy_logps(),
            extras_apart=self.method.extra_term is not None,
        )
        is_first = self.mode == "train" and self.state.global_step == 0
        head = self.scorer.heads[self.mode]
        return MicroBatchLoss(self.method_loss, batch, columns, head, self._moment(), measures_clip=is_first)

    def _mixed_loss(self, model: torch.nn.Module, of_states: MicroBatchLoss):
        """The method's loss plus TRL's policy-gradient loss (and a router's loss), from one student forward."""
        batch = of_states.batch
        with head_function(self.model, of_states, keep_forward=True) as request:
            cached = self.policy_logps(model, batch)
        loss, stats = request.result
        facts, weight = stats.pop("facts", None), self.args.reward_weight
        if facts is not None:
            loss = loss + self.policy_loss(model, {**batch, "advantages": of_states.advantages(facts)}, cached)
        else:  # TRL adds the router's loss to its own, where the reward's weight would weigh it too
            loss = loss + (weight * self.policy_loss(model, batch, cached) if weight > 0 else 0.0)
            loss = loss + (1.0 - weight) * self._router_loss(cached[2])
        return loss, stats

    def _router_loss(self, balance: torch.Tensor | None) -> torch.Tensor | float:
        """A micro-batch's part of the router's loss of a step, which is the mean over its micro-batches; 0 without experts."""
        steps = self.current_gradient_accumulation_steps if self.mode == "train" else 1
        return 0.0 if balance is None else self.router_aux_loss_coef * balance / steps

    def check_finite_loss(self) -> None:
        """Stop on NaN or inf in the loss of the current step, see `FiniteLosses.check`."""
        self._finite.check(self.state.global_step, self._prompt_texts)

    # Hooks of RolloutTrainer: what a checkpoint keeps of the batch and of the logging interval

    def pending_values(self) -> dict[str, Any]:
        return {
            "prompt_texts": self._prompt_texts,
            "groups": self.groups.state(),
            "memory": self.memory,
            "diagnostics": self.diagnostics["train"].state(),
        }

    def check_pending_values(self, values: dict[str, Any]) -> None:
        if values.get("base_teacher"):  # of a run that began before markers held more of it
            check_initial_weights({"old": fingerprint(self.teacher.values)}, {"old": values["base_teacher"]})

    def restore_pending_values(self, values: dict[str, Any]) -> None:
        self._prompt_texts = values["prompt_texts"]
        self.groups.restore(values["groups"])
        self.memory = values["memory"]
        self.diagnostics["train"].restore(values["diagnostics"], self.accelerator.device)

    # Logs and files

    def _decomposition_is_due(self) -> bool:
        interval, step = self.method.decomposition_steps(self.args), self.state.global_step
        before = step - self._updates_per_generation()
        return self.mode == "train" and interval > 0 and step // interval > before // interval

    def _log_decomposition(self, length: int) -> None:
        """Log how much of the teacher's signal on some rollouts the solution alone explains."""
        sums = self.targets.sum_signals(self._batch, length, DECOMPOSED_ROLLOUTS)
        *sums, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        for name, value in zip(SignalDecomposition._fields, sums, strict=True):
            self.add_metrics({f"decomposition/{name}": value / max(count, 1)})

    def _log_rollouts(self) -> None:
        own, counts = self._batch, self._batch.counts.result()
        self.add_metrics(measure_rollouts(counts, own.shortened, own.target.num_tokens, self.accelerator))
        self.add_table_column("divergence", [float("nan")] * len(counts.markers))
        self.add_table_column("reflection_markers", counts.markers)
        self.add_table_column("solution_shortened", own.shortened)
        self.add_table_column("teacher_views", [views_text(contexts) for contexts in own.contexts])

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
            with self.calls_as_text():
                super().log(logs, start_time)
        finally:
            self.num_completions_to_print = shown
        if self.log_completions and self.accelerator.is_main_process:
            print(rollouts_text(self.table_rows(), self.state.global_step, shown), end="", flush=True)

    def reward_of_row(self, row: dict[str, Any]) -> float | None:
        """The weighted reward of a row of the completions table; None where no function judged it."""
        weighted = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        rewards = [weight * row[name] for name, weight in weighted if not math.isnan(row[name])]
        return sum(rewards) if rewards else None

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
        interval = args.teacher_sync_steps or self.trainer._updates_per_generation()
        if state.global_step % interval == 0:
            lost = self.trainer.teacher.update()
            if args.teacher_model_kind == "ema":
                self.trainer.add_metrics({"teacher/ema_rank_loss": lost})
