# SPDX-License-Identifier: Apache-2.0
"""TRL's private seams of sampling and of a step, as hooks with public names.

`RolloutTrainer` sits between `trl.GRPOTrainer` and our trainers. It calls the parent's method first, then hands what
it returned to a hook with a public name; no method of TRL is copied. `check_trl` says which private name is missing
when TRL has moved.
"""

import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn import functional
from transformers.utils import get_json_schema
from transformers.utils.chat_template_utils import DocstringParsingException, TypeHintParsingException
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from ..checkpoints.state import load_state, save_state
from ..teacher.forwards import counted_positions
from .checkpoints import CheckedTrainer
from .naming import NamedByMethod
from .prompts import OrderAndLog
from .versions import HAS_ROUTER_LOSS, NUM_LOGPS_VALUES, check_trl, warn_if_untested


def model_for_generation(trainer: Any) -> AbstractContextManager:
    """Context of a trainer's model without its engine, with ZeRO-3's weights gathered as for rollouts."""
    args = trainer.args
    settings = {"gather_deepspeed3_params": getattr(args, "ds3_gather_for_generation", True)}
    name = "gradient_checkpointing_kwargs"  # which TRL 1.0 does not take
    if name in inspect.signature(unwrap_model_for_generation).parameters:
        settings[name] = args.gradient_checkpointing_kwargs
    return unwrap_model_for_generation(trainer.model_wrapped, trainer.accelerator, **settings)


# Of what a checkpoint holds of a pending batch: one more wherever its columns or `pending_values` change.
PENDING_LAYOUT = 3


def student_inputs(batch: dict[str, Any], length: int | None = None) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Ids and mask (B, S) of a micro-batch's prompts and rollouts, and how many of the S stand behind the prompts.

    Extras, where the batch has some, are further rows: (B + k, S).

    Args:
        batch: `prompt_ids`, `completion_ids` and their masks, and perhaps `extra_ids` and `extra_mask` (B, E), which k rows have
            an extra, `extra_rows` (k,), and `extra_prompt_ids` and `extra_prompt_mask` where extras have prompts of their own.
        length: of the rollouts' part that is read; None for all.
    """
    prompt = (batch["prompt_ids"], batch["prompt_mask"])
    parts = [(prompt, (batch["completion_ids"][:, :length], batch["completion_mask"][:, :length]))]
    if "extra_ids" in batch:
        extra, rows = (batch["extra_ids"], batch["extra_mask"]), batch["extra_rows"]
        before = (batch["extra_prompt_ids"], batch["extra_prompt_mask"]) if "extra_prompt_ids" in batch else prompt
        parts.append(tuple(tuple(own.index_select(0, rows) for own in pair) for pair in (before, extra)))
    width, start = max(own[0].size(1) for _, own in parts), prompt_width(batch)

    def joined(first: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        first = functional.pad(first, (start - first.size(1), 0))
        return torch.cat([first, functional.pad(own, (0, width - own.size(1)))], 1)

    ids, mask = (torch.cat([joined(first[k], own[k]) for first, own in parts]) for k in range(2))
    return ids, mask, width


def prompt_width(batch: Mapping[str, Any]) -> int:
    """Positions of `student_inputs` before rollouts and extras begin."""
    widths = [batch[name].size(1) for name in ("prompt_ids", "extra_prompt_ids") if name in batch]
    return max(widths)


def schema_of(tool: Any) -> Any:
    """What a chat template is told of a tool.

    Raises:
        ValueError: its docstring or its type hints do not say enough; names the tool.
    """
    if not callable(tool):
        return tool
    try:
        return get_json_schema(tool)
    except (DocstringParsingException, TypeHintParsingException) as error:
        raise ValueError(
            f"tools: {getattr(tool, '__name__', tool)} cannot be described to the model: {error} Give every argument a type hint "
            "and a line under `Args:` in the docstring."
        ) from error


def _with_text_calls(turn: dict[str, Any]) -> dict[str, Any]:
    calls = turn.get("tool_calls")
    return {**turn, "tool_calls": json.dumps(calls, ensure_ascii=False)} if calls else turn


class RolloutTrainer(OrderAndLog, CheckedTrainer, NamedByMethod, GRPOTrainer):
    """GRPOTrainer with its private seams turned into hooks. Subclasses implement `add_targets` and `step_loss`."""

    def __init__(self, **kwargs):
        check_trl()
        warn_if_untested()
        # Older versions lack some arguments (`quantization_config` came in TRL 1.8); None is every default.
        super().__init__(**{name: value for name, value in kwargs.items() if value is not None})
        if not hasattr(self, "_tokenizer"):  # TRL 1.3 gave it a name of its own
            self._tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        check_trl(instance=self)
        self._rewards: torch.Tensor | None = None
        self._rollout_ids: list[list[int]] = []
        self._rewards_are_logged = True
        self._cached_logps = None
        self._resumed_interval: dict[str, Any] | None = None

    # Hooks

    def prepare_rows(self, rows: list[dict]) -> list[dict]:
        """Dataset rows before sampling."""
        return rows

    def before_rewards(self, rows: list[dict], prompts: list, completions: list, rollout_ids: list[list[int]]) -> None:
        """Begin what may run beside the rewards of a generation batch, which are computed next.

        Args:
            rows: of this rank, from `prepare_rows`.
            prompts: as they were sampled from, with what an environment put behind the dataset's.
            completions: as TRL gives them to rewards.
            rollout_ids: see `add_targets`.
        """

    def add_targets(
        self, rows: list[dict], batch: dict[str, Any], rewards: torch.Tensor, rollout_ids: list[list[int]]
    ) -> dict[str, Any]:
        """Add what the loss needs to a scored generation batch.

        Args:
            rows: of this rank, from `prepare_rows`.
            batch: TRL's.
            rewards: (world batch, functions).
            rollout_ids: of each row every token behind its prompt, also of a rollout that the batch's masks leave out.
        """
        raise NotImplementedError

    def step_loss(self, model: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
        """Loss of one micro-batch, divided by everything it is to be divided by."""
        raise NotImplementedError

    def reads_policy_logps(self) -> bool:
        """Whether the loss reads the log-probabilities that TRL takes when it samples (old, reference)."""
        return True

    def pending_values(self) -> dict[str, Any]:
        """What this rank keeps between optimizer steps, as JSON: for the batch and logging interval it is in."""
        return {}

    def check_pending_values(self, values: dict[str, Any]) -> None:
        """Refuse what `pending_values` gave in a run that this one cannot continue; of any layout."""

    def restore_pending_values(self, values: dict[str, Any]) -> None:
        """Take over what `pending_values` gave; called before the first step of a resumed run."""

    def arrange_rows(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of one optimizer step, in which rows may have changed places; once, when they are split."""
        return batches

    def prepare_micro_batch(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """What a micro-batch gets before its step, when a GPU may still be waited for; asked again when a run resumes."""
        return {}

    def count_loss_items(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """0-d numbers of items of a micro-batch that its losses average over, by the key that gets the global count."""
        raise NotImplementedError

    # What the hooks may ask for

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, also where the processing class is a processor."""
        return self._tokenizer

    @property
    def end_token_ids(self) -> set[int]:
        """Tokens that end a rollout; one that was cut at the limit has none of them at its end."""
        return set(getattr(self, "eos_token_ids", [self._tokenizer.eos_token_id]))  # later TRL

    def first_rows(self) -> list[int]:
        """Indices of the rows that a fresh run samples from first; none of a stream."""
        if not hasattr(self.train_dataset, "__len__"):
            return []
        return list(dict.fromkeys(islice(self._get_train_sampler(), self.args.generation_batch_size)))

    def render_kwargs(self) -> dict[str, Any]:
        """What TRL passes to `apply_chat_template` beside the user's arguments; tools as the schemas that it makes of them."""
        tools = getattr(self, "tools", None)
        kwargs = {"tools": [schema_of(tool) for tool in tools]} if tools else {}
        if getattr(self, "chat_template", None) is not None:
            kwargs["chat_template"] = self.chat_template
        return kwargs

    @property
    def has_tools(self) -> bool:
        """Whether rollouts may have several turns."""
        return bool(getattr(self, "tools", None))

    @property
    def has_environments(self) -> bool:
        """Whether an environment belongs to each rollout of the generation batch."""
        return bool(getattr(self, "environments", None))

    def texts_of(self, completions: list) -> list[str] | None:
        """Texts of rollouts as TRL decoded them, without control tokens; None where it made more of them than a text."""
        parses = any(getattr(self._tokenizer, name, None) for name in ("response_template", "response_schema"))
        if self.has_tools or parses:
            return None
        return [each if isinstance(each, str) else each[0]["content"] for each in completions]

    def environment_reports(self) -> list[Any] | None:
        """What the environment of each of this rank's rollouts says of it, its attribute `feedback`; None without environments."""
        if not self.has_environments:
            return None
        return [getattr(each, "feedback", None) for each in self.environments]

    def limit_rollouts(self, length: int | None) -> None:
        """Sample at most `length` new tokens from now on, whichever engine samples; None for the longest allowed."""
        length = length or self.max_completion_length
        if self.use_vllm:
            self.vllm_generation.max_completion_length = length
        else:
            self.generation_config.max_new_tokens = length
        if "max_new_tokens" in (getattr(self, "generation_kwargs", None) or {}):  # continuous batching reads these
            self.generation_kwargs["max_new_tokens"] = length

    def add_table_column(self, name: str, values: list) -> None:
        """Append one value per local rollout to a column of the completions table (a collective)."""
        self._logs["extra"][name].extend(gather_object(values))

    def fill_table_column(self, name: str, values: dict[int, float]) -> None:
        """Overwrite rows of a column by world-batch index, where `add_table_column` put a placeholder (a collective)."""
        column = self._logs["extra"][name]
        for index, value in gather_object(list(values.items())):
            if index < len(column):
                column[index] = value

    def table_rows(self) -> list[dict[str, Any]]:
        """Rows of the completions table of the last generation batch, as far as every column has them."""
        logs = self._logs
        columns = {"prompt": logs["prompt"], "completion": logs["completion"], **logs["rewards"]}
        columns |= {"advantage": logs["advantages"], **logs["extra"]}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=False)]

    @contextmanager
    def calls_as_text(self) -> Iterator[None]:
        """The time in which the table's calls of tools are JSON: a Parquet column has one type, and arguments have many."""
        if not self.has_tools:
            yield
            return
        column, kept = self._logs["completion"], list(self._logs["completion"])
        column.clear()
        column.extend([_with_text_calls(turn) for turn in turns] for turns in kept)
        try:
            yield
        finally:
            column.clear()
            column.extend(kept)

    def policy_loss(self, model: torch.nn.Module, batch: dict[str, Any], logps_and_entropies: tuple) -> torch.Tensor:
        """TRL's policy-gradient loss from log-probabilities that were computed already."""
        self._cached_logps = logps_and_entropies
        try:
            return super()._compute_loss(model, batch)
        finally:
            self._cached_logps = None

    def policy_logps(self, model: torch.nn.Module, batch: dict[str, Any]) -> tuple:
        """Log-probabilities (B, T), entropies (B, T) and router loss of the student, with gradient.

        Where the batch has `extra_ids` (B, E), they are read in the same forward; the values are those of the rollouts.
        """
        ids, mask, length = student_inputs(batch)
        router_loss = {"compute_aux_loss": self.aux_loss_enabled} if HAS_ROUTER_LOSS else {}
        with self._counted_positions(model):
            log_probs, entropies, *rest = super()._get_per_token_logps_and_entropies(
                model, ids, mask, length, compute_entropy=True, **router_loss
            )
        size, width = batch["completion_ids"].shape
        return log_probs[:size, :width], entropies[:size, :width], rest[0] if HAS_ROUTER_LOSS else None

    def write_answers(self, prompts: list[list[int]], sampling: Mapping[str, float] | None = None) -> list[list[int]]:
        """Token ids that the model answers to prompts, by TRL's own sampling, one each; a collective.

        Args:
            prompts: token ids of each of this rank's rows, as many on every rank as it samples rollouts.
            sampling: `temperature` and `top_p` of these answers alone; None for those of rollouts.
        """
        sample = super()._generate_single_turn
        sizes = self.num_generations, self.num_generations_eval
        self.num_generations = self.num_generations_eval = 1  # a vLLM server samples a group from its first prompt
        groups = {"num_generations": 1} if "num_generations" in inspect.signature(sample).parameters else {}
        try:
            with self._sampling_as(**(sampling or {})):
                return self._generate_single_turn(prompts, None, {}, **groups)[0]
        finally:
            self.num_generations, self.num_generations_eval = sizes

    @contextmanager
    def _sampling_as(self, temperature: float | None = None, top_p: float | None = None) -> Iterator[None]:
        """Within the context tokens are drawn so, whichever engine samples; None leaves a number as it is."""
        wanted = {"temperature": temperature, "top_p": top_p}
        before = self._draw_with({name: value for name, value in wanted.items() if value is not None})
        try:
            yield
        finally:
            self._draw_with(before)

    def _draw_with(self, values: Mapping[str, float]) -> dict[str, float]:
        """Set numbers of sampling, and return what they were."""
        if self.use_vllm:
            before = {"temperature": self.vllm_generation.temperature, "top_p": self.vllm_generation.top_p}
        else:
            before = {"temperature": self.generation_config.temperature, "top_p": self.generation_config.top_p}
        for name, value in values.items():
            setattr(self.vllm_generation if self.use_vllm else self.generation_config, name, value)
        kwargs = getattr(self, "generation_kwargs", None) or {}  # continuous batching reads these
        kwargs.update({name: value for name, value in values.items() if name in kwargs})
        return before

    def rewards_of(self, rows: list[dict], texts: list[str], ids: list[list[int]]) -> torch.Tensor:
        """Rewards (world batch, functions) of other answers to this rank's rows than their rollouts; a collective.

        They are in no log and no table.
        """
        talks = not isinstance(rows[0]["prompt"], str)
        answers = [[{"role": "assistant", "content": text}] for text in texts] if talks else texts
        self._rewards_are_logged = False
        try:
            return super()._calculate_rewards(rows, [row["prompt"] for row in rows], answers, ids)
        finally:
            self._rewards_are_logged = True

    # TRL's seams

    def _generate_and_score_completions(self, inputs):
        rows = self.prepare_rows(inputs)
        batch = super()._generate_and_score_completions(rows)
        return self.add_targets(rows, batch, self._rewards, self._rollout_ids)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        self._rollout_ids = completion_ids_list
        self.before_rewards(inputs, prompts, completions, completion_ids_list)
        self._rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        return self._rewards

    def _log_completion_extra(self, column, values):
        if self._rewards_are_logged:
            super()._log_completion_extra(column, values)

    def _log_metric(self, name, value):
        if self._rewards_are_logged:
            super()._log_metric(name, value)

    def _compute_loss(self, model, inputs):
        return self.step_loss(model, inputs)

    def _get_per_token_logps_and_entropies(self, model, input_ids, *args, **kwargs):
        if self._cached_logps is not None:
            return self._cached_logps[:NUM_LOGPS_VALUES]
        if not self.reads_policy_logps():
            # Asked for by the generation step (old or reference log-probabilities), read by the policy loss alone.
            completion_length = args[1] if len(args) > 1 else kwargs["logits_to_keep"]
            zeros = input_ids.new_zeros(input_ids.size(0), completion_length, dtype=torch.float32)
            return (zeros, None, None)[:NUM_LOGPS_VALUES]
        with self._counted_positions(model):
            return super()._get_per_token_logps_and_entropies(model, input_ids, *args, **kwargs)

    def _counted_positions(self, model: torch.nn.Module) -> AbstractContextManager:
        """TRL names no positions, and its prompts are padded on the left."""
        return counted_positions(model, self.accelerator.unwrap_model(model))

    def _prepare_inputs(self, generation_batch):
        before = self._buffered_inputs
        batch = super()._prepare_inputs(generation_batch)
        if self.mode == "eval":
            self._prepare_window([batch])
        elif self._buffered_inputs is not before:
            window = self.args.gradient_accumulation_steps
            for start in range(0, len(self._buffered_inputs), window):
                self._prepare_window(self._buffered_inputs[start : start + window])
        return batch

    def _prepare_window(self, batches):
        """Prepare the micro-batches of one optimizer step, and give them the counts, over all ranks, of their losses."""
        for batch, arranged in zip(batches, map(dict, self.arrange_rows(batches)), strict=True):
            batch.clear()  # in place: TRL has handed out the first of them
            batch.update(arranged)
            batch.update(self.prepare_micro_batch(batch))
        counts = [self.count_loss_items(batch) for batch in batches]
        sums = torch.stack([torch.stack(list(count.values())).float() for count in counts]).sum(0)
        sums = self.accelerator.reduce(sums, reduction="sum")
        for batch in batches:
            batch.update(zip(counts[0], sums, strict=True))

    # The middle of a generation batch and of a logging interval

    def has_pending_batch(self) -> bool:
        """Whether micro-batches of the last generation batch are still to come."""
        return bool(self._buffered_inputs) and self._step % self._batches_per_generation() > 0

    def restore_interval(self) -> None:
        """Continue the logging interval of the checkpoint; once the parent has begun an empty one."""
        interval, self._resumed_interval = self._resumed_interval, None
        if interval is not None:
            self._tr_loss.fill_(interval["loss"])
            self._globalstep_last_logged = interval["last_logged"]
            for name, values in interval["metrics"].items():
                self._metrics["train"][name] = values

    def _batches_per_generation(self) -> int:
        return self.args.steps_per_generation * self.args.num_iterations

    def _pending_batches(self) -> list:
        """The micro-batches still to come, None in place of those that no iteration will read again."""
        if not self.has_pending_batch():
            return []
        done, size = self._step % self._batches_per_generation(), self.args.steps_per_generation
        used = max(0, done - (self._batches_per_generation() - size))
        return [None] * used + list(self._buffered_inputs[used:])

    def _shape_of_run(self) -> dict[str, int]:
        names = ("steps_per_generation", "num_iterations", "gradient_accumulation_steps", "per_device_train_batch_size")
        return {"layout": PENDING_LAYOUT, **{name: getattr(self.args, name) for name in names}}

    def save_pending(self, checkpoint: Path) -> None:
        values = {
            "run_id": self.run.id,
            "run": self._shape_of_run(),
            "step": self._step,
            "interval": {
                "loss": self._tr_loss.item(),
                "last_logged": self._globalstep_last_logged,
                "metrics": dict(self._metrics["train"]),
            },
            "own": self.pending_values(),
        }
        accelerator = self.accelerator
        save_state(checkpoint, accelerator.process_index, accelerator.num_processes, values, self._pending_batches())

    def load_pending(self, checkpoint: str) -> None:
        accelerator = self.accelerator
        state = load_state(checkpoint, accelerator.process_index, accelerator.num_processes, accelerator.device)
        if state is not None and state[0].get("run_id", self.run.id) != self.run.id:
            raise ValueError(
                f"{checkpoint}: the state of rank {accelerator.process_index} is of another run than the marker. Files of "
                "two runs were mixed there; give another checkpoint."
            )
        if state is not None:
            self.check_pending_values(state[0]["own"])
        self._buffered_inputs = None
        self._step = self.state.global_step * self.args.gradient_accumulation_steps
        if state is not None and state[0]["run"] == self._shape_of_run():
            values, batches = state
            self._step, self._buffered_inputs = values["step"], batches or None
            self._resumed_interval = values["interval"]
            self.restore_pending_values(values["own"])
            for batch in batches:
                if batch is not None:
                    batch.update(self.prepare_micro_batch(batch))
        elif self._step % self._batches_per_generation():
            warnings.warn(
                f"{checkpoint} stands in the middle of a generation batch and does not hold the rest of it for this "
                "version of trl_opsd, number of processes, steps_per_generation, num_iterations, gradient_accumulation_steps and "
                "per_device_train_batch_size: the rest is sampled anew, so the run is not the uninterrupted one.",
                stacklevel=2,
            )
