# SPDX-License-Identifier: Apache-2.0
"""Rollouts of several turns: the model calls a calculator and runs Python, and the teacher reads how its code fared.

    python examples/tools.py --model Qwen/Qwen3-1.7B
    python examples/tools.py

TRL samples a turn, runs the tools that it calls, and samples on behind their results. The method here is SDPO: the teacher of a
rollout reads a right rollout of the same problem, or what the environment reports of this one (its attribute `feedback`).

Without `--model` the embedded model is trained. Nobody taught it to call tools, so this file brings a chat template and writes the
first turn for it (`rollout_func`); a model that calls tools needs neither.
"""

import argparse
import ast
import json
import operator
import subprocess
import sys
import tempfile
from typing import Any

from transformers import AutoTokenizer

from trl_opsd import SDPOConfig, SDPOTrainer
from trl_opsd.demo import build_dataset, model_path

SECONDS, MEGABYTES, CHARACTERS = 2, 256, 1000  # that a program may take, and that are shown of what it prints
# A program lowers its own limits before it runs; its parent ends it when the clock has run out too.
LIMITED = f"""
import resource, sys
for name, most in (("CPU", {SECONDS}), ("AS", {MEGABYTES} << 20), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + name), (most, most))
exec(compile(sys.stdin.read(), "<program>", "exec"), {{"__name__": "__main__"}})
"""
OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str:
    """Value of an arithmetic expression.

    Args:
        expression: numbers, brackets and the operators + - * /.
    """
    return f"{_value(ast.parse(expression, mode='eval').body):g}"


def _value(node: ast.expr) -> float:
    match node:
        case ast.Constant(value=int() | float() as number):
            return number
        case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
            return OPERATORS[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand)
    raise ValueError(f"{ast.unparse(node)} is no arithmetic")


def run_program(code: str) -> tuple[str, str]:
    """What a program printed, and why it ended if it failed.

    It runs in a process of its own with little time, memory and nothing to write to. That stops accidents; it can still read the
    machine's files and reach the network, so run untrusted code in a container.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-I", "-c", LIMITED]
        try:
            done = subprocess.run(
                command, input=code, capture_output=True, text=True, cwd=folder, env={}, timeout=2 * SECONDS
            )
        except subprocess.TimeoutExpired:
            return "", f"it did not end within {2 * SECONDS} seconds"
    if done.returncode < 0:
        return done.stdout, f"it was stopped by signal {-done.returncode}; it has {SECONDS} seconds of processor time"
    error = done.stderr.strip().split("\n")[-1] if done.returncode else ""
    return done.stdout, error


class Sandbox:
    """The environment of one rollout. Its public methods are tools; TRL resets it for the next rollout.

    Attributes:
        feedback: what the teacher may read of the rollout; None where there is nothing to say.
    """

    def __init__(self):
        self.feedback: str | None = None

    def reset(self, **row: Any) -> None:
        """Begin a rollout; a text that is returned here stands behind the prompt."""
        self.feedback = None

    def run_python(self, code: str) -> str:
        """Run a Python program and return what it prints.

        Args:
            code: the program.
        """
        printed, error = run_program(code)
        if error:
            self.feedback = f"The program\n{code}\nfailed: {error}"
        elif not printed.strip():
            self.feedback = f"The program\n{code}\nprinted nothing."
        return (printed + error)[:CHARACTERS]


# For the embedded model

TEMPLATE = """\
{%- if tools %}
{{- '<|im_start|>system\\n' }}
{%- for tool in tools %}
{{- tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')\\n' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}
{{- '<tool_call>' + call.function | tojson + '</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think></think>\\n' }}
{%- endif %}
{%- endif %}"""
# How a turn that follows the template is read again (docs/tools.md); of the usual models TRL knows it.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "reasoning_content": {"open": "<think>", "close_pattern": "</think>\\n*", "content": "text"},
        "tool_calls": {
            "open": "<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|im_end|>", "content": "text"},
    },
}


def embedded_tokenizer() -> Any:
    """The embedded model's tokenizer with a chat template that has tools."""
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, RESPONSE_TEMPLATE
    return tokenizer


def call(name: str, **arguments: Any) -> str:
    """A turn that calls a tool, as the template writes it."""
    return f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call><|im_end|>"


def first_turns(prompts: list, trainer: Any) -> dict[str, Any]:
    """A call in place of the model's first turn: of each tool in turn, the second time with a slip."""
    tokenizer, settings = trainer.processing_class, trainer.args.chat_template_kwargs
    tools = {"tools": trainer.tools, "add_generation_prompt": True, "tokenize": True, "return_dict": False}
    questions = [prompt[-1]["content"].removesuffix("=?") for prompt in prompts]
    turns = [
        call("calculate", expression=text) if index % 2 else call("run_python", code=f"print({text}")
        for index, text in enumerate(questions)
    ]
    return {
        "prompt_ids": [tokenizer.apply_chat_template(prompt, **tools, **settings) for prompt in prompts],
        "completion_ids": [tokenizer(turn, add_special_tokens=False)["input_ids"] for turn in turns],
        "logprobs": None,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--model")
    model = parser.parse_args().model
    args = SDPOConfig(
        output_dir="outputs/tools",
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        num_generations=4,
        max_completion_length=1024 if model else 192,
        max_tool_calling_iterations=3,
        chat_template_kwargs={"enable_thinking": False},
        log_completions=True,
        num_completions_to_print=2,
        logging_steps=1,
        bf16=False,
        report_to="none",
    )
    trainer = SDPOTrainer(
        model=model or model_path(),
        args=args,
        train_dataset=build_dataset("train", 64),
        processing_class=None if model else embedded_tokenizer(),
        tools=[calculate],
        environment_factory=Sandbox,
        rollout_func=None if model else first_turns,
    )
    trainer.train()
