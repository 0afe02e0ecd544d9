# SPDX-License-Identifier: Apache-2.0
"""Turns that call tools: the example's template, and scripts that take the place of sampling."""

import copy
import importlib.util
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "tools.py"


def load_example():
    """examples/tools.py as a module."""
    spec = importlib.util.spec_from_file_location("example_tools", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_EXAMPLE = load_example()
call, calculate = _EXAMPLE.call, _EXAMPLE.calculate


def tool_tokenizer(tokenizer):
    """A tokenizer of the demo's kind whose chat template has tools."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template, tokenizer.response_template = _EXAMPLE.TEMPLATE, _EXAMPLE.RESPONSE_TEMPLATE
    return tokenizer


def scripted(trainer, scripts):
    """In place of TRL's sampling of one turn: row i of all ranks says the turns of script i one after the other."""
    tokenizer, state = trainer.tokenizer, {}

    def sample(prompt_ids, *args, **kwargs):
        asked = [tokenizer.decode(ids) for ids in prompt_ids]
        answered = [text.count("</tool_response>") for text in asked]
        if not any(answered):
            first = trainer.accelerator.process_index * len(prompt_ids)
            state["rows"] = list(range(first, first + len(prompt_ids)))
        else:  # TRL asks for the rows that go on, in their order
            state["rows"] = [row for row in state["rows"] if len(scripts[row % len(scripts)]) > max(answered)]
        turns = [scripts[row % len(scripts)][count] for row, count in zip(state["rows"], answered, strict=True)]
        ids = [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in turns]
        return ids, None

    return sample
