# SPDX-License-Identifier: Apache-2.0
"""What rollouts of several turns bring: calls of tools and their results, what an environment shows and reports.

TRL runs the tools and marks which tokens they wrote. Here the teacher gets what the student was told, and the rollout what was said.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..methods import Method
from ..rows.checks import without_special_tokens
from ..rows.texts import Prompt, is_missing
from ..teacher.contexts import Rollout

REPORT = "feedback"  # attribute of an environment, and the column that it stands in for


def check_tools(method: Method, tools: Any, environments: Any, dataset: Any) -> None:
    """Check before training that a method takes rollouts of several turns, where there are tools or environments.

    Raises:
        ValueError: names the argument or the method, and what to do.
    """
    if not tools and environments is None:
        return
    given = "tools" if tools else "environment_factory"
    if isinstance(environments, Mapping):
        raise ValueError(
            f"environment_factory is a dict of {sorted(environments)}: each row would have tools of its own, and the teacher's "
            "prompts are rendered with one set. Give one factory whose environment chooses by the row that `reset` gets, or train "
            "apart."
        )
    if method.asks is not None and method.extras is not None:
        raise ValueError(
            f"{given}: {method.name} trains on sequences that the model writes in one turn beside the rollouts, where no tool runs: "
            "calls would be trained without results. Take another method (docs/tools.md), or leave the tools out."
        )
    prompt = next(iter(dataset)).get("prompt")
    if isinstance(prompt, str):
        raise ValueError(
            f"{given}: `prompt` of the first row is text, and tools are called in a conversation. Give "
            '[{"role": "user", "content": ...}].'
        )


def observation_of(prompt: Prompt, sampled: Prompt) -> str:
    """What an environment put behind the last message of a prompt.

    Raises:
        ValueError: it is no text.
    """
    own, told = prompt[-1]["content"], sampled[-1]["content"]
    if not isinstance(told, str):
        raise ValueError(
            f"environment_factory: `reset` returned parts of a message ({str(told)[:80]}), and teachers read text. Return text or "
            "None; images of environments are not supported."
        )
    assert told.startswith(own), "TRL puts observations behind the prompt"
    return told.removeprefix(own)


def turns_of(completion: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Messages of a rollout.

    Raises:
        ValueError: a tool wrote something else than text.
    """
    for message in completion:
        if not isinstance(message.get("content") or "", str):
            raise ValueError(
                f"tools: {message.get('name')} returned parts of a message ({str(message['content'])[:80]}), and teachers read "
                "text. Return text; images of tools are not supported."
            )
    return tuple(dict(message) for message in completion)


def with_report(rollout: Rollout, report: Any, special_tokens: Sequence[str]) -> Rollout:
    """A rollout with what its environment reports as the column `feedback`; as it is where it reports nothing.

    Raises:
        ValueError: the report is no text.
    """
    if not isinstance(report, str | None):
        raise ValueError(
            f"environment_factory: the attribute `{REPORT}` of an environment is {report!r}; set it to text, or to None where there "
            "is nothing to say."
        )
    if is_missing(report):
        return rollout
    return replace(rollout, columns={**rollout.columns, REPORT: without_special_tokens(report, special_tokens)})


def check_tool_ranks(accelerator: Any, args: Any) -> None:
    """Check that ranks may sample different numbers of turns: each samples as long as its own rollouts call tools.

    Raises:
        ValueError: sampling waits for the other ranks, or counts on their having as many prompts; names the setting.
    """
    if accelerator.num_processes == 1:
        return
    plugin, vllm = getattr(accelerator.state, "deepspeed_plugin", None), args.use_vllm
    is_sharded = str(accelerator.distributed_type).endswith("FSDP") or (plugin is not None and plugin.zero_stage == 3)
    reason = None
    if vllm and args.vllm_mode == "server":
        reason = "vllm_mode='server': TRL deals out a server's answers as if every rank had asked for as many"
    elif vllm and args.vllm_tensor_parallel_size > 1:
        reason = f"vllm_tensor_parallel_size={args.vllm_tensor_parallel_size}: the ranks of an engine sample together"
    elif is_sharded and (not vllm or args.vllm_enable_sleep_mode):
        reason = "sharded weights (ZeRO-3, FSDP): they are gathered from all ranks for every turn"
    if reason is not None:
        raise ValueError(
            f"tools on {accelerator.num_processes} processes with {reason}. Ranks sample different numbers of turns, so they would "
            "wait for ever or mix up answers. Use DDP or ZeRO-2, with transformers or with an engine of each rank's own "
            "(vllm_mode='colocate', vllm_tensor_parallel_size=1, vllm_enable_sleep_mode=False), or one process."
        )
