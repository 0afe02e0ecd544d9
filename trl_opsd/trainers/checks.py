# SPDX-License-Identifier: Apache-2.0
"""What a trainer refuses before any training, beyond what its config can know."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Any

import torch
from transformers import AutoConfig

from .._trl.versions import trusts_remote_code
from ..methods import Method
from ..methods.privileged import PrivilegedText
from ..model.checks import check_model_config
from ..model.heads import causal_lm
from ..rewards import make_accuracy_reward, no_reward
from ..rows.checks import check_dataset
from ..rows.passes import check_datasets
from ..teacher.contexts import Contexts
from ..teacher.jobs import ScoringJob
from ..verification import warn_of_golds, which_verify
from .kernels import prepare_layer_kernels

_ROWS_TO_VERIFY = 32


def check_inputs(
    method: Method, config_class: type, model: Any, args: Any, train_dataset: Any, eval_dataset: Any
) -> None:
    """Check arguments, datasets and model before anything is loaded.

    Raises:
        ValueError: names the argument and what to give instead.
    """
    if not isinstance(args, config_class):
        raise ValueError(
            f"args is a {type(args).__name__}; {method.name} needs {config_class.__name__}, which takes the "
            "same fields and more."
        )
    if method.reads_old and args.loss_temperature != args.temperature:
        raise ValueError(
            f"loss_temperature={args.loss_temperature} with temperature={args.temperature}: {method.name} compares the student "
            "with the policy that sampled, whose log-probabilities TRL takes at the sampling temperature. Leave "
            "loss_temperature unset."
        )
    prepare_layer_kernels(args)
    if train_dataset is None:
        raise ValueError("train_dataset is None; give a dataset with the columns `prompt` and `solution`.")
    if isinstance(train_dataset, Mapping):
        raise ValueError(
            f"train_dataset is a dict of {sorted(train_dataset)}; give one of them, for instance its 'train'."
        )
    check_datasets(partial(check_dataset, needs_solution=method.needs_solution), train_dataset, eval_dataset)
    for name, dataset in (("train_dataset", train_dataset), ("eval_dataset", eval_dataset)):
        check_columns(method, args, dataset, name)
    check_model_config(config_of(model, args))


def check_answers(method: Method, **arguments: Any) -> None:
    """Check that an answer is a text alone where a method has answers rewarded that are no rollouts.

    Args:
        method: whose drafts may be rewarded.
        arguments: of the trainer, by name, that give a rollout more than its text.

    Raises:
        ValueError: names the first that is given.
    """
    given = [name for name, value in arguments.items() if value]
    if given and method.drafts is not None and method.drafts.top_k is not None:
        raise ValueError(
            f"{given[0]} is given, but {method.name} has the reward functions judge texts that call no tool and meet no environment. "
            "Leave it out, or take another method."
        )


def check_columns(method: Method, args: Any, dataset: Any, name: str) -> None:
    """Check that a dataset, or each of a dict of them, has the columns that a method and its templates read under `args`.

    Raises:
        ValueError: it lacks one, or has prompts that the method does not take.
    """
    privileged = PrivilegedText(method, args)
    if isinstance(dataset, Mapping):
        for key, part in dataset.items():
            check_columns(method, args, part, f"{name}[{key!r}]")
        return
    columns = getattr(dataset, "column_names", None)  # None where a stream does not know them
    missing = [column for column in method.needed_columns(args) if columns is not None and column not in columns]
    if missing:
        raise ValueError(
            f"{name} has no column `{missing[0]}`, which {method.name} reads; it has {sorted(columns)}. Add it. (On the command "
            "line, dataset_format makes `prompt` and `solution` and drops every other column; use problem_column and "
            "solution_column instead.)"
        )
    privileged.check_columns(columns, name)


def check_fills_a_batch(args: Any, dataset: Any) -> None:
    """Check that a training set has the rows of one batch: an incomplete one is left out, and no step would be trained.

    TRL samples a generation batch of distinct prompts at once; SFT and GKD leave rows out with `dataloader_drop_last` alone.
    A stream is read as far as is needed.

    Raises:
        ValueError: it has fewer; names both numbers and what to set.
    """
    per_device, steps = args.per_device_train_batch_size, getattr(args, "steps_per_generation", None)
    if steps is not None:
        processes, group = args.generation_batch_size // (per_device * steps), args.num_generations
        needed = args.generation_batch_size // group
        batch = f"a generation batch takes {needed} prompts (per_device_train_batch_size={per_device} x {processes} "
        batch += f"process{'es' * (processes > 1)} x steps_per_generation={steps} / num_generations={group})"
    else:
        whole = args.dataloader_drop_last and not getattr(args, "packing", False)
        needed = per_device * args.world_size if whole else 1
        batch = f"a batch takes {needed} (per_device_train_batch_size={per_device} on {args.world_size} processes)"
    num_rows = len(dataset) if hasattr(dataset, "__len__") else sum(1 for _ in islice(dataset, needed))
    if num_rows >= needed:
        return
    lower = "or lower per_device_train_batch_size." if steps is None else _smaller_batch(args, processes, num_rows)
    raise ValueError(
        f"train_dataset has {num_rows} row{'s' * (num_rows != 1)}, but {batch}, and an incomplete one is left out: no step "
        f"would be trained. Give at least {needed} rows, {lower}"
    )


def _smaller_batch(args: Any, processes: int, num_rows: int) -> str:
    """What to set for a generation batch of at most `num_rows` prompts."""
    for steps in range(args.steps_per_generation - 1, 0, -1):
        prompts, rest = divmod(args.per_device_train_batch_size * processes * steps, args.num_generations)
        if rest == 0 and prompts <= num_rows:
            return f"or set gradient_accumulation_steps (and steps_per_generation, where it is set) to {steps}."
    return "or lower per_device_train_batch_size or gradient_accumulation_steps."


def check_trained(state: Any) -> None:
    """Check, when training has ended, that it began: a stream may have held too few rows.

    Raises:
        ValueError: no optimizer step was made, so that there is nothing to save.
    """
    if state.global_step == 0:
        raise ValueError(
            "Training ended without an optimizer step: train_dataset did not fill one batch on every process. The model is "
            "untrained and was not saved. Give more rows, or lower per_device_train_batch_size or "
            "gradient_accumulation_steps."
        )


def choose_reward(method: Method, reward_funcs: Any, dataset: Any, verifier: str) -> Any:
    """The user's reward functions; else accuracy where solutions hold an answer; else a zero that TRL needs there.

    Raises:
        ValueError: the method needs to know which rollouts are right, and nothing says so.
    """
    if reward_funcs:
        return reward_funcs
    if any(which_verify(first_solutions(dataset), verifier)):
        return make_accuracy_reward(verifier)
    if method.needs_reward:
        raise ValueError(
            "reward_funcs is not given and no `solution` of the first rows holds an answer that "
            f"verifier={verifier!r} can read, but {method.name} needs to know which rollouts are right. Set another verifier, "
            "or pass a reward function."
        )
    return no_reward


def first_solutions(dataset: Any) -> list[str | None]:
    """Solutions of the rows by which a dataset is judged before training."""
    return [row.get("solution") for row in islice(dataset, _ROWS_TO_VERIFY)]


def warn_of_first_golds(dataset: Any, verifier: str) -> str | None:
    """What to know where answers of the first rows are no mathematics, but are read as such."""
    return warn_of_golds(first_solutions(dataset), verifier, "train_dataset")


def check_capped_head(method: Method, args: Any, jobs: Sequence[ScoringJob] = ()) -> None:
    """Check that a model that caps its logits is never asked for the logits of a sum of hidden states.

    Args:
        method: its target must have no direction.
        args: settings of the run.
        jobs: of a scoring; every row's anchor must be one view.

    Raises:
        ValueError: it would be; names the method.
    """
    anchors = [job for job in jobs if job.anchor]
    one_view_a_row = all(job.anchor == 1 for job in anchors) and len({job.row for job in anchors}) == len(anchors)
    if method.shape(args, 0).uses_direction or not one_view_a_row:
        raise ValueError(
            f"model: it caps its logits (final_logit_softcapping), and {method.name} adds up several views of the teacher "
            "as hidden states, which only a linear head allows. Use OPSD, whose target is one view, or a model without "
            "the cap."
        )


def check_owners(method: Method, args: Any, model: torch.nn.Module) -> None:
    """Check that hidden states under several weights are never added up where each would need a head of its own.

    Raises:
        ValueError: the output head trains, and a target's views are read by more than one owner's weights.
    """
    head, owners = causal_lm(model).get_output_embeddings(), method.owners(args)
    has_target = method.has_target or method.extras_have_target
    if (
        owners
        and has_target
        and method.target_owner is None
        and any(parameter.requires_grad for parameter in head.parameters())
    ):
        raise ValueError(
            f"model: its output head trains, and {method.name} adds up views under the weights of {owners} and of the "
            "teacher, which only one head can read. Train LoRA without the head (peft_config)."
        )


def check_targets(method: Method, contexts: Sequence[Contexts], num_rollouts: int) -> None:
    """Check that views have the owner that the method names for its target, and those of extras an anchor where one is read.

    Args:
        method: whose contexts they are.
        contexts: of rollouts, and behind `num_rollouts` of them of extras.
        num_rollouts: see there.

    Raises:
        ValueError: names the method and the view.
    """
    owner = method.target_owner
    for view in (view for views in contexts for view in views if view.anchor or view.direction):
        if owner is not None and view.weights != owner:
            raise ValueError(
                f"{method.name}: the view {view.template!r} of its target has weights={view.weights!r}, and target_owner is "
                f"{owner!r}. Give it these weights, or leave target_owner out."
            )
    for view in (view for views in contexts[num_rollouts:] for view in views):
        if view.direction or (view.anchor and not method.extras_have_target):
            raise ValueError(
                f"{method.name}: an extra's view {view.template!r} has anchor={view.anchor} and direction={view.direction}. "
                "Extras have no direction, and an anchor only where extra_term has a divergence."
            )


@contextmanager
def named_place(place: str) -> Iterator[None]:
    """Within the context, a ValueError that does not name `place` gets it in front."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(place):
            raise
        raise ValueError(f"{place}: {error}") from error


def config_of(model: Any, args: Any) -> Any:
    """The config of a model, or of the one that a name or folder stands for."""
    if not isinstance(model, str):
        return model.config
    revision = (args.model_init_kwargs or {}).get("revision")
    return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=trusts_remote_code(args))


def check_sampling_keeps_weights(model: torch.nn.Module, args: Any) -> None:
    """Check that sampling leaves the trained weights as they are: TRL's continuous batching casts the model for good.

    Raises:
        ValueError: the weights that train would lose their float32.
    """
    names = ("use_transformers_continuous_batching", "use_transformers_paged")  # the older name
    used = [name for name in names if getattr(args, name, False)]
    narrow = [name for name in ("bf16", "fp16") if getattr(args, name)]
    if used and narrow and any(p.requires_grad and p.dtype == torch.float32 for p in model.parameters()):
        raise ValueError(
            f"{used[0]}=True with {narrow[0]}=True: at the first sampling TRL casts the whole model, and the float32 weights "
            "that train would lose most updates to rounding from then on. Sample with vLLM or leave it out; or set "
            f"{narrow[0]}=False."
        )


def check_same_weights(model: torch.nn.Module, accelerator: Any) -> None:
    """Under FSDP2, check that every rank was given the same trainable weights; a collective.

    FSDP2 shards each rank's own values without a broadcast, so different ones would become a mixture of models.

    Raises:
        ValueError: they differ.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or plugin.cpu_ram_efficient_loading:  # which sends rank 0's to all
        return
    sums = [parameter.detach().double().sum() for parameter in model.parameters() if parameter.requires_grad]
    total = torch.stack([value.to(accelerator.device) for value in sums]).sum()
    if len(set(accelerator.gather(total[None]).tolist())) > 1:
        raise ValueError(
            "model: ranks hold different weights, which FSDP2 would shard into a mixture. Give the model by name, seed "
            "before making it, or set fsdp_cpu_ram_efficient_loading: true."
        )
