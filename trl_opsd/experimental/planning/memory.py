# SPDX-License-Identifier: Apache-2.0
"""What a run needs on each GPU, part by part, from the model's config and the run's settings.

Some parts are there all the time, the others belong to one phase of a step: sampling, scoring by the teacher, or the
forward and backward of a micro-batch. The peak is what is always there and the largest phase.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...losses import LinearShape
from ...losses.projection import WIDENED_ROWS
from ...losses.tiles import BLOCK_BYTES, MIN_TILE_TOKENS, TILE_BYTES
from ...methods import Method
from ...methods.stand_in import StandIn, stand_in
from ...teacher.states import waits_in_host_memory
from ...trainers.self_distillation import DECOMPOSED_ROLLOUTS
from .footprint import Footprint
from .workload import ENGINES, Workload

GIB = 2**30

# DeepSpeed's defaults: elements of a reduction bucket, and of parameters that stay gathered between layers.
_BUCKET, _LIVE = 500_000_000, 1_000_000_000
# Of a CUDA context, communication and libraries; and the share that the allocator loses between blocks.
_CONTEXT_BYTES, _FRAGMENTATION = 2 * GIB, 0.05


@dataclass(frozen=True)
class Part:
    """Bytes on each GPU that one thing needs in one phase, "always", "sampling", "scoring" or "training"."""

    name: str
    phase: str
    bytes: float


@dataclass(frozen=True)
class MemoryPlan:
    """Parts of a run's memory on each GPU."""

    parts: tuple[Part, ...]

    def of_phase(self, phase: str) -> float:
        """Bytes of one phase, without what is always there."""
        return sum(part.bytes for part in self.parts if part.phase == phase)

    @property
    def peak_phase(self) -> str:
        """The phase that needs most."""
        return max(("sampling", "scoring", "training"), key=self.of_phase)

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.of_phase("always") + self.of_phase(self.peak_phase)


def plan_memory(
    footprint: Footprint,
    args: Any,
    method: Method,
    *,
    engine: str = "single",
    num_gpus: int = 1,
    gpu_bytes: float = 80 * GIB,
    workload: Workload | None = None,
    autocast: bool = True,
    device: str = "cuda",
) -> MemoryPlan:
    """Plan a run.

    Args:
        footprint: of the model, see `footprint.measure_footprint`; in bfloat16 for an engine that computes in it.
        args: the trainer's config.
        method: what the teacher reads and how the target is shaped.
        engine: one of `ENGINES`.
        num_gpus: devices that share what the engine splits.
        gpu_bytes: memory of one, of which a colocated vLLM takes its share.
        workload: lengths of prompts and solutions.
        autocast: whether bfloat16 is used for computing.
        device: "cuda", or "cpu" for one process without a CUDA context.

    Raises:
        ValueError: an unknown engine, or one GPU's engine on several.
    """
    if engine not in ENGINES:
        raise ValueError(f"engine={engine!r} is not known; set it to one of {ENGINES}.")
    if engine == "single" and num_gpus != 1:
        raise ValueError(f"num_gpus={num_gpus} with engine='single'; set engine to ddp, zero2, zero3 or fsdp2.")
    run = _Run(footprint, args, method, engine, num_gpus, gpu_bytes, workload or Workload(), autocast, device)
    parts = [*run.always(), *run.sampling(), *run.scoring(), *run.training()]
    if device == "cuda":
        plan = MemoryPlan(tuple(parts))
        parts.append(
            Part("context, communication, fragmentation", "always", _CONTEXT_BYTES + _FRAGMENTATION * plan.total)
        )
    return MemoryPlan(tuple(part for part in parts if part.bytes))


@dataclass(frozen=True)
class _Run:
    model: Footprint
    args: Any
    method: Method
    engine: str
    num_gpus: int
    gpu_bytes: float
    workload: Workload
    autocast: bool
    device: str

    # Sizes

    @property
    def deepspeed(self) -> bool:
        return self.engine in ("zero2", "zero3")

    @property
    def splits_weights(self) -> bool:
        return self.engine in ("zero3", "fsdp2")

    @property
    def trained_bytes(self) -> int:
        """Bytes of one trained parameter as the engine holds it."""
        return 2 if self.deepspeed else self.model.adapter_bytes

    @property
    def rows(self) -> int:
        """Rollouts of one generation batch on one device."""
        return self.args.per_device_train_batch_size * self.args.steps_per_generation

    @property
    def distilled(self) -> int:
        longest = self.args.max_completion_length
        return min(self.args.distillation_length_at(None) or longest, longest)

    @property
    def head_entries(self) -> int:
        return self.model.head[0] * self.model.head[1]

    @property
    def uses_direction(self) -> bool:
        return self.method.shape(self.args, 0).uses_direction

    @cached_property
    def read(self) -> StandIn:
        """What the method says of stand-in rollouts of whole groups."""
        return stand_in(self.method, self.args, most=self.args.num_generations)

    @property
    def num_views(self) -> int:
        """Teacher contexts of a rollout at most, those of the sequence beside it among them; 1 where there is none."""
        beside = 0 if self.read.extra is None else len(self.read.extra.contexts)
        return max(1, len(self.read.most) + beside)

    @property
    def num_states(self) -> int:
        """Hidden states that a target holds for each position; none where views are only read."""
        return self.method.has_target * (1 + self.uses_direction)

    @property
    def beside(self) -> int:
        """Tokens of the sequence that is trained on beside a rollout, 0 without."""
        return 0 if self.read.extra is None else self.args.max_completion_length

    @property
    def written(self) -> int:
        """Tokens of the text that the model writes before scoring, 0 without."""
        return 0 if self.read.request is None else self.args.max_completion_length

    @property
    def context(self) -> int:
        """Tokens of the longest teacher prompt."""
        inserted = self.workload.solution + (0 if self.beside else self.written)  # it is read, or trained on
        if self.method.needs_group:
            inserted = max(
                inserted, getattr(self.args, "max_rollout_context_length", None) or self.args.max_completion_length
            )
        whole = self.workload.prompt + inserted
        return min(whole, self.args.max_teacher_prompt_length or whole)

    # Always

    def always(self) -> list[Part]:
        model, trained = self.model, self.model.trainable
        split = self.num_gpus if self.splits_weights else 1
        frozen_bytes = 2 if self.deepspeed else model.parameter_bytes
        weights = ((model.parameters - trained) * frozen_bytes + trained * self.trained_bytes) / split
        copies = {"single": 1, "ddp": 2}.get(self.engine, 1 / self.num_gpus)  # DDP's buckets hold a second one
        buckets = min(_BUCKET, trained) * 2 if self.deepspeed else 0
        moments = 2 if "8bit" in self.args.optim else 2 * self.trained_bytes
        per_parameter = moments if not self.deepspeed else 12  # float32 weights and both moments
        shards = 1 if self.engine in ("single", "ddp") else self.num_gpus
        positions = self.distilled * self.num_states + self.beside * self.method.extras_have_target
        states = self.rows * positions * model.head[1] * 4
        if self.device == "cuda" and waits_in_host_memory(states):
            states = 0
        colocated = self.args.use_vllm and self.args.vllm_mode == "colocate"
        return [
            Part("weights", "always", weights),
            Part("gradients", "always", trained * self.trained_bytes * copies + buckets),
            Part("optimizer states", "always", trained * per_parameter / shards),
            Part("teacher's weights", "always", self._teacher_weights()),
            Part("targets: anchor and direction", "always", states),
            Part("numbers of the views that are read", "always", self._numbers()),
            Part("vLLM", "always", self.args.vllm_gpu_memory_utilization * self.gpu_bytes if colocated else 0),
        ]

    def _teacher_weights(self) -> float:
        kind = self.args.teacher_model_kind
        copy_bytes = 4 if kind == "ema" else 2 if self.engine == "zero3" else self.model.adapter_bytes
        copied = 0 if kind == "live" or (kind == "base" and not self.model.head_trains) else self.model.trainable
        owners = [owner for owner in self.method.owners(self.args) if owner != kind]  # of weights beside the teacher's
        copied += self.model.trainable * (owners.count("base") if self.model.head_trains else 0)
        copied = copied * copy_bytes / (self.num_gpus if self.engine == "zero3" else 1)
        head = self.head_entries * 2 if self.model.head_trains and self.splits_weights else 0
        return copied + head

    def _numbers(self) -> float:
        """Log-probability and entropy of each token under each view that is read."""
        if not self.method.reads_views:
            return 0
        return self.rows * self.num_views * max(self.distilled, self.beside) * 2 * 4

    def _gathered(self) -> float:
        """Parameters that are whole while a forward runs, where the engine splits them."""
        model = self.model
        if self.engine == "zero3":
            return 2 * (min(model.parameters, _LIVE) + self.head_entries)
        rest = model.parameters - model.num_layers * model.layer_parameters
        return 2 * (2 * model.layer_parameters + rest) if self.engine == "fsdp2" else 0

    # Phases

    def sampling(self) -> list[Part]:
        if self.args.use_vllm:
            return []
        model, prompt = self.model, self.workload.prompt + (self.workload.solution if self.written else 0)
        length = prompt + self.args.max_completion_length
        whole = self.engine == "zero3" and self.args.ds3_gather_for_generation
        logits = self.rows * model.head[0] * 32  # scores, sorted with their indices, probabilities, their sums
        prefill = model.running.at(self.rows, prompt)
        return [
            Part("gathered weights", "sampling", 2 * model.parameters if whole else self._gathered()),
            Part("KV cache", "sampling", self.rows * length * model.cache),
            Part("forward, or logits of a step", "sampling", max(prefill, model.running.fixed + logits)),
        ]

    def scoring(self) -> list[Part]:
        model, job = self.model, self.context + max(self.distilled, self.beside)
        tokens = max(job, min(self.args.teacher_tokens_per_forward, self.rows * self.num_views * job))
        shared = self.method.needs_group
        forward = model.running.at(tokens / job, self.distilled if shared else job, job)
        if shared:
            forward = max(forward, model.running.at(1, self.context))
        decomposed = 3 * min(DECOMPOSED_ROLLOUTS, self.rows) if self.method.decomposition_steps(self.args) else 0
        cast = 2 * model.trainable if self._casts_teacher() else 0
        return [
            Part("gathered weights", "scoring", self._gathered()),
            Part(
                "teacher's weights in the engine's dtype",
                "scoring",
                cast / (self.num_gpus if self.splits_weights else 1),
            ),
            Part("teacher forward", "scoring", forward),
            Part("KV cache of shared contexts", "scoring", tokens * model.cache if shared else 0),
            Part("views of the decomposition", "scoring", decomposed * self.distilled * model.head[1] * 4),
        ]

    def _casts_teacher(self) -> bool:
        kind = self.args.teacher_model_kind
        copied = kind == "ema" or (kind == "base" and self.model.head_trains)
        return (
            copied and self.deepspeed and (kind == "ema" or (self.engine == "zero2" and self.model.adapter_bytes > 2))
        )

    def training(self) -> list[Part]:
        model, length = self.model, self.workload.prompt + max(self.distilled, self.beside)
        size = self.args.per_device_train_batch_size * (2 if self.beside else 1)
        kept = model.saved_rest.at(size, length)
        if self.args.gradient_checkpointing:
            kept += model.saved_layer.at(size, length)
            kept += size * length * model.num_layers * model.head[1] * model.hidden_bytes
        else:
            kept += model.num_layers * model.saved_layer.at(size, length)
        # Its gradient, summed in float32 by each of the fused losses.
        head = 4 * self.head_entries * (2 if self.method.extra_term else 1) if model.head_trains else 0
        # In turn: the loss, which scales that sum in place; the backward, to whose end a tied head's gradient waits.
        most = max(self._tiles() + head, model.backward.at(size, length) + head * model.head_tied)
        return [
            Part("gathered weights", "training", self._gathered()),
            Part("activations", "training", kept),
            Part("states of the loss", "training", self._states()),
            Part("loss, then backward", "training", most),
        ]

    def _states(self) -> float:
        """Student's states and their gradient in float32, the micro-batch's rows of the targets."""
        positions = self.args.per_device_train_batch_size * (self.distilled + self.beside)
        return positions * self.model.head[1] * (4 + 2 * self.model.hidden_bytes + 4 * self.num_states)

    def _tiles(self) -> float:
        model, (vocabulary, hidden) = self.model, self.model.head
        positions = self.args.per_device_train_batch_size * (self.distilled + self.beside)
        shape = self.method.shape(self.args, 0)
        num_tiles = 1 + self.method.has_target + (self.uses_direction and not isinstance(shape, LinearShape))
        step = min(positions, max(MIN_TILE_TOKENS, TILE_BYTES[self.device] // (4 * vocabulary)))
        tiles = step * vocabulary * (4 * num_tiles + (2 if self.device == "cuda" else 0))
        blocks = 8 * min(BLOCK_BYTES[self.device], step * vocabulary * 4)
        if self.device == "cuda":
            head = 2 * self.head_entries if model.parameter_bytes > 2 else 0  # narrowed once
        else:
            head = 4 * WIDENED_ROWS * hidden if model.parameter_bytes < 4 else 0
        if model.head_trains and model.parameter_bytes < 4:  # the second sum, in the head's dtype
            head += self.head_entries * model.parameter_bytes
        return tiles + blocks + head
