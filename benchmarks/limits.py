# SPDX-License-Identifier: Apache-2.0
"""The floor of one optimizer step of OPSD on H100s, by arithmetic, beside the memory that `trl-opsd plan` sees.

    python benchmarks/limits.py

Nothing is run but a count of a model's matrices on the meta device. A step has 32 rollouts over all GPUs, and every
rollout has the whole length. What is counted on each GPU:
  prefill      the student's forward over the prompts, before the first token is sampled
  sampling     for each token of all rollouts at once, the weights and their cache read in bfloat16, or the products
               where those take longer
  teacher      one forward over prompt, solution and rollout, without the head
  student      forward and backward over prompt and rollout, without the head; the forward twice where the run's
               settings have gradient checkpointing
  head         its products: teacher, student, the gradient to the student's states and, where it trains, to itself
  optimizer    AdamW reads a float32 weight, its gradient and two moments, and writes all but the gradient
  collectives  what a GPU sends to the others for gradients and split weights, beside teacher, student and head
Attention is causal. Elementwise work, padding, launches and the host are not counted: these are what separates a run
from the second figure, which takes `REACHED` in place of `PEAK`.

Two more tables say how much of a step the head is, and what reading a context once for all rollouts of a prompt saves.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from memory import config_of

from trl_opsd.commands.plan import Planned, paper_run
from trl_opsd.experimental.planning.footprint import load_config, meta_model
from trl_opsd.experimental.planning.memory import GIB
from trl_opsd.experimental.planning.workload import Workload


@dataclass(frozen=True)
class Device:
    """What one GPU does in a second: products in bfloat16 (FLOP), its memory and its links one way (bytes)."""

    flop: float
    memory: float
    link: float


# NVIDIA's data sheet of the H100 SXM: dense bfloat16 (half of that with sparsity), HBM3, NVLink of 900 GB/s both ways.
PEAK = Device(flop=989.4e12, memory=3.35e12, link=450e9)
# Of the products: Llama 3's training on up to 16,384 H100s (arXiv 2407.21783, table 4: 38 to 43 %).
PRODUCTS_REACHED = 0.40
# Of the memory: Llama-2-7B in bfloat16, one token at a time, reads 1,397 of an A100's 2,039 GB/s (README of
# github.com/pytorch-labs/gpt-fast).
MEMORY_REACHED = 0.685
# Of the links: an author of NCCL on eight H100s (github.com/NVIDIA/nccl-tests, issue 212: 370 of 450 GB/s).
LINK_REACHED = 370 / 450
REACHED = Device(PEAK.flop * PRODUCTS_REACHED, PEAK.memory * MEMORY_REACHED, PEAK.link * LINK_REACHED)

# The README of github.com/siyan-zhao/OPSD, as of March 2026: a run of Qwen3-1.7B takes about 15 minutes on 4 H100; the
# paper's runs have at most 100 steps (arXiv 2601.18734, version 3). LoRA, vLLM beside the training.
PAPER_RUN, PAPER_SECONDS = ("Qwen3-1.7B", 4, True), 15 * 60 / 100

ADAMW_BYTES = 7 * 4  # of a weight: four float32 numbers read, three written
# Shape, GPUs, whether an adapter trains, and the engine: None for the one that splits least and fits by the plan.
RUNS = [
    (*run, lora, None)
    for lora in (True, False)
    for run in (("Qwen3-1.7B", 1), ("Qwen3-1.7B", 4), ("Qwen3-1.7B", 8), ("Qwen3-8B", 8))
] + [("Qwen3-8B", 8, False, "zero3")]
SHARED_CONTEXTS = [(count, context, span) for count in (1, 4, 8, 16) for context, span in ((1280, 1024), (4352, 256))]


@dataclass(frozen=True)
class Sizes:
    """Entries of what a model multiplies with.

    Attributes:
        layers: of the matrices of all layers, without adapters.
        head: of the output head.
        adapters: of what is trained beside them, 0 where all weights train.
        total: of all weights, the embeddings and adapters among them.
        trained: of those that train.
        attention: queries of a token, all layers and heads.
        cache: keys and values of a token, all layers and heads.
    """

    layers: int
    head: int
    adapters: int
    total: int
    trained: int
    attention: int
    cache: int

    @classmethod
    def of(cls, config: Any, peft_config: Any = None) -> "Sizes":
        """Count a config's, with an adapter where `peft_config` is given."""
        plain, model = (meta_model(config, torch.bfloat16, adapter) for adapter in (None, peft_config))
        head = plain.get_output_embeddings().weight
        ends = (plain.get_input_embeddings().weight, head)
        layers = sum(p.numel() for p in plain.parameters() if p.dim() == 2 and all(p is not end for end in ends))
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layers=layers,
            head=head.numel(),
            adapters=0 if peft_config is None else trained,
            total=sum(p.numel() for p in model.parameters()),
            trained=trained,
            attention=config.num_hidden_layers * config.num_attention_heads * head_size,
            cache=2 * config.num_hidden_layers * config.num_key_value_heads * head_size,
        )


def causal_pairs(length: int, new: int | None = None) -> int:
    """Pairs of a token and one that it attends to, of the last `new` tokens (None: of all) of a row."""
    before = 0 if new is None else length - new
    return length * (length + 1) // 2 - before * (before + 1) // 2


def forward_flop(sizes: Sizes, tokens: int, pairs: int, *, adapters: bool = True) -> int:
    """FLOP of a forward through the layers: two for each entry and token, four for each query entry and pair."""
    return 2 * tokens * (sizes.layers + adapters * sizes.adapters) + 4 * sizes.attention * pairs


def backward_flop(sizes: Sizes, tokens: int, pairs: int) -> int:
    """FLOP of a backward through the layers: to the states, to what trains, and twice the forward's attention."""
    trains = sizes.adapters or sizes.layers
    return 2 * tokens * (sizes.layers + sizes.adapters + trains) + 8 * sizes.attention * pairs


@dataclass(frozen=True)
class Work:
    """What one phase needs of a GPU: products (FLOP), memory and links (bytes)."""

    flop: float = 0
    memory: float = 0
    link: float = 0

    def seconds(self, device: Device) -> float:
        """The longest of the three, which run beside one another."""
        return max(self.flop / device.flop, self.memory / device.memory, self.link / device.link)


def step_work(
    sizes: Sizes, args: Any, workload: Workload, engine: str = "single", num_gpus: int = 1
) -> dict[str, Work]:
    """The phases of one optimizer step on one GPU.

    Args:
        sizes: of the model.
        args: the trainer's config: micro-batches, lengths, checkpointing.
        workload: lengths of prompt and solution.
        engine: one of the planner's.
        num_gpus: devices that share what the engine splits.
    """
    micro_batches, new = args.gradient_accumulation_steps, args.max_completion_length
    rows = args.per_device_train_batch_size * micro_batches
    read = workload.prompt + new
    scored = read + workload.solution
    head_trains = not sizes.adapters
    trained_on = rows * read, rows * causal_pairs(read)
    passes = 1 + bool(args.gradient_checkpointing)
    student = passes * forward_flop(sizes, *trained_on) + backward_flop(sizes, *trained_on)
    attended = causal_pairs(read, new)
    sampled = 2 * rows * new * (sizes.layers + sizes.head) + 4 * sizes.attention * rows * attended
    weights_read = 2 * new * (sizes.layers + sizes.head)  # at once for all rows
    forwards = -(-rows // max(1, args.teacher_tokens_per_forward // scored))
    prompts = rows * workload.prompt, rows * causal_pairs(workload.prompt)
    return {
        "prefill": Work(flop=forward_flop(sizes, *prompts, adapters=False)),
        "sampling": Work(flop=sampled, memory=weights_read + 2 * sizes.cache * rows * attended),
        "teacher": Work(flop=forward_flop(sizes, rows * scored, rows * causal_pairs(scored), adapters=False)),
        "student": Work(flop=student),
        "head": Work(flop=2 * rows * new * sizes.head * (3 + head_trains)),
        "optimizer": Work(memory=ADAMW_BYTES * sizes.trained / (num_gpus if engine.startswith("zero") else 1)),
        "collectives": Work(link=link_bytes(sizes, engine, num_gpus, micro_batches, forwards)),
    }


def link_bytes(sizes: Sizes, engine: str, num_gpus: int, micro_batches: int, teacher_forwards: int) -> float:
    """Bytes that one GPU sends in a step; a gather or scatter of a tensor sends all but the GPU's own part."""
    others = (num_gpus - 1) / num_gpus
    if engine in ("single", "ddp"):
        return others * 2 * 4 * sizes.trained  # float32 gradients, scattered and gathered
    scattered = micro_batches * 2 * sizes.trained
    if engine == "zero2":
        return others * (scattered + 2 * sizes.trained)
    if engine == "zero3":  # weights for forward, backward, each forward of the teacher, and sampling
        return others * (scattered + 2 * sizes.total * (2 * micro_batches + teacher_forwards + 1))
    raise ValueError(f"engine={engine!r} is not counted; set it to single, ddp, zero2 or zero3.")


def step_seconds(work: dict[str, Work], device: Device) -> float:
    """Phases in turn, collectives beside teacher, student and head."""
    took = {name: part.seconds(device) for name, part in work.items()}
    trained = max(took["teacher"] + took["student"] + took["head"], took["collectives"])
    return took["prefill"] + took["sampling"] + trained + took["optimizer"]


def engine_of(run: Planned, num_gpus: int) -> str:
    """The engine that splits least and fits into a GPU by the plan."""
    engines = ("single",) if num_gpus == 1 else ("ddp", "zero2")
    return next((engine for engine in engines if run.fits(engine, num_gpus)), "zero3")


def limits_table(runs: list[tuple[str, int, bool, str | None]], workload: Workload) -> Iterator[str]:
    """Milliseconds of each phase at the peak, seconds of the step, and the plan's GiB."""
    names = ("prefill", "sampling", "teacher", "student", "head", "optimizer", "collectives")
    told = "s at peak", "s as reached", "plan GiB", "paper s"
    yield _row("model", "GPUs", "trained", "rollouts a GPU", *(f"{name} ms" for name in names), *told)
    yield "|" + "---|" * (len(names) + 8)
    for shape, num_gpus, lora, engine in runs:
        run = paper_run(shape, "opsd", num_gpus, lora=lora)
        run.workload = workload
        engine = engine or engine_of(run, num_gpus)
        work = step_work(Sizes.of(run.config, run.peft_config), run.args, workload, engine, num_gpus)
        yield _row(
            shape,
            f"{num_gpus} {engine}",
            "LoRA" if lora else "all",
            run.args.per_device_train_batch_size * run.args.gradient_accumulation_steps,
            *(f"{1000 * work[name].seconds(PEAK):.0f}" for name in names),
            f"{step_seconds(work, PEAK):.2f}",
            f"{step_seconds(work, REACHED):.2f}",
            f"{run.plan(engine, num_gpus).total / GIB:.0f}",
            f"{PAPER_SECONDS:.0f}" if (shape, num_gpus, lora) == PAPER_RUN else "-",
        )


def head_table(workloads: dict[str, Workload], completion: int) -> Iterator[str]:
    """The head's entries over those of the layers, and its share of the products of teacher, student and head."""
    yield _row("model", "head / layers", *(f"share of products, {name}" for name in workloads))
    yield "|" + "---|" * (2 + len(workloads))
    for name, config in head_models().items():
        sizes = Sizes.of(config)
        args = paper_run("Qwen3-1.7B", "opsd", 1, lora=False).changed(max_completion_length=completion).args
        shares = []
        for workload in workloads.values():
            work = step_work(sizes, args, workload)
            shares.append(work["head"].flop / sum(work[part].flop for part in ("teacher", "student", "head")))
        yield _row(name, f"{sizes.head / sizes.layers:.0%}", *(f"{share:.0%}" for share in shares))


def head_models() -> dict[str, Any]:
    """The random model of the benchmarks, and the two that the papers train."""
    return {"100M": config_of("100M"), **{name: load_config(name) for name in ("Qwen3-1.7B", "Qwen3-8B")}}


def sharing(sizes: Sizes, count: int, context: int, span: int) -> tuple[float, float]:
    """Tokens and FLOP of a teacher that reads the context for each of `count` rollouts, over those of once for all."""
    alone = count * (context + span), count * causal_pairs(context + span)
    shared = context + count * span, causal_pairs(context) + count * causal_pairs(context + span, span)
    return alone[0] / shared[0], forward_flop(sizes, *alone) / forward_flop(sizes, *shared)


def sharing_table(sizes: Sizes) -> Iterator[str]:
    """What a context that is read once saves, by shape."""
    yield _row("rollouts a prompt", "context", "scored tokens", "tokens, each / once", "FLOP, each / once")
    yield "|" + "---|" * 5
    for shape in SHARED_CONTEXTS:
        yield _row(*(f"{number:,}" for number in shape), *(f"{ratio:.2f}" for ratio in sharing(sizes, *shape)))


def _row(*cells: Any) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt_tokens", type=int, default=Workload.prompt, help="of each prompt")
    parser.add_argument("--solution_tokens", type=int, default=Workload.solution, help="of each solution")
    options = parser.parse_args(arguments)
    workload = Workload(options.prompt_tokens, options.solution_tokens)
    print(*limits_table(RUNS, workload), sep="\n")
    ratios = {f"solution : rollout {ratio} : 1": Workload(workload.prompt, ratio * 1024) for ratio in (1, 4)}
    print("", *head_table(ratios, 1024), sep="\n")
    print("", *sharing_table(Sizes.of(load_config("Qwen3-1.7B"))), sep="\n")


if __name__ == "__main__":
    main()
