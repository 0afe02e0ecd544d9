# SPDX-License-Identifier: Apache-2.0
"""Host seconds of a generation batch beside sampling and forwards: TRL's GRPOTrainer, and what a method adds.

    OMP_NUM_THREADS=1 python benchmarks/host_time.py --tokenizer FOLDER [--methods opsd ogls-sd] [--rollouts 256] [--tokens 1024]

The engine is a stand-in that sleeps for `--sampling` seconds and gives texts that were encoded before; the teacher's forwards sleep
for `--teacher` seconds; neither is counted, but what runs meanwhile is hidden, as it is in training. Problems, solutions and
rollouts are cut from the prose of docs/. Printed are the fastest of the repeats: wall seconds beside the pauses, and of these what
lies before sampling and behind it.
"""

import argparse
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from measuring import emit, machine
from row_checks import train_tokenizer
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_opsd.pages import trainer_of
from trl_opsd.trainers import scorer

PROSE = [
    path.read_text(encoding="utf-8").replace("<|", "<")  # a control token in a text is refused
    for path in sorted(Path(__file__).parent.parent.glob("docs/**/*.md"))
]


def passage(draw: random.Random, tokens: int) -> str:
    """A piece of the docs of about so many tokens."""
    text = draw.choice([text for text in PROSE if len(text) > 5 * tokens])
    start = draw.randrange(len(text) - 4 * tokens)
    return text[start : start + 4 * tokens]


def make_rows(count: int, group: int, tokens: int) -> list[dict[str, Any]]:
    """Rows as a sampler gives them: a problem of 150 tokens and a solution, `group` of each behind each other."""
    draw = random.Random(0)
    rows = []
    for index in range(count // group):
        prompt = [{"role": "user", "content": f"{index}: {passage(draw, 150)}"}]
        rows += [{"prompt": prompt, "solution": f"{passage(draw, tokens)} \\boxed{{{index}}}"}] * group
    return rows


def make_rollouts(tokenizer: Any, count: int, tokens: int) -> list[list[int]]:
    """Ids of rollouts that are `tokens` long and end with a boxed answer."""
    draw = random.Random(1)
    texts = [f"{passage(draw, 3 * tokens)} \\boxed{{{index}}}" for index in range(count)]
    return [ids[-tokens:] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


class StandIn:
    """Takes the place of the engine and of the teacher's forwards, which take their time and no processor.

    Args:
        rollouts: ids of each, which the engine gives.
        sampling: seconds that it takes.
        teacher: seconds that the forwards of one generation batch take.
    """

    def __init__(self, rollouts: list[list[int]], sampling: float, teacher: float):
        self.rollouts, self.sampling, self.teacher = rollouts, sampling, teacher
        self.asked = self.paused = 0.0

    def sample(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        """In place of `_generate_single_turn`."""
        self.asked = time.perf_counter()
        self._pause(self.sampling)
        return self.rollouts, None

    def score(self, run: Any, jobs: Any, target: Any, **settings: Any) -> Any:
        """In place of `score_contexts`."""
        self._pause(self.teacher if jobs else 0.0)
        return target

    def _pause(self, seconds: float) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.paused += time.perf_counter() - start

    def seconds(self, trainer: Any, rows: list[dict]) -> tuple[float, float]:
        """Seconds before and behind sampling, of one generation batch."""
        start, self.paused = time.perf_counter(), 0.0
        trainer._generate_and_score_completions([dict(row) for row in rows])
        return self.asked - start, time.perf_counter() - self.asked - self.paused


def make_trainer(method: str, model: Any, tokenizer: Any, rows: list[dict], group: int, folder: str) -> Any:
    """A trainer of a method, or TRL's own, which is given answers as rewards that cost nothing."""
    make: Callable[..., Any] = trainer_of(method) if method != "grpo" else GRPOTrainer
    config = GRPOConfig if method == "grpo" else make.config_class
    rewards = {} if method == "opsd" else {"reward_funcs": lambda completions, **_: [i % 2 for i in range(len(rows))]}
    args = config(
        folder,
        num_generations=group if method != "opsd" else 1,
        per_device_train_batch_size=len(rows),
        gradient_accumulation_steps=1,
        report_to=[],
        use_cpu=True,
        bf16=False,
        **({"decomposition_steps": 0} if method == "purified-opsd" else {}),  # its sums are forwards, too
    )
    return make(model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **rewards)


def main() -> None:
    """Print a row a method."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", help="folder; else a byte-level BPE of 16,000 tokens is trained on the docs")
    parser.add_argument("--methods", nargs="+", default=["grpo", "opsd", "purified-opsd", "ogls-sd", "sdpo"])
    parser.add_argument("--rollouts", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--sampling", type=float, default=5.0, help="seconds that the engine takes")
    parser.add_argument("--teacher", type=float, default=2.0, help="seconds that the teacher's forwards take")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer) if options.tokenizer else train_tokenizer(PROSE)
    torch.manual_seed(0)
    width = {"hidden_size": 8, "intermediate_size": 8, "head_dim": 8}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(tokenizer), max_position_embeddings=40_960, **width, **heads))
    rollouts = make_rollouts(tokenizer, options.rollouts, options.tokens)
    stand_in = StandIn(rollouts, options.sampling, options.teacher)
    scorer.score_contexts = stand_in.score
    warnings.simplefilter("ignore")
    for method in options.methods:
        group = 1 if method == "opsd" else 8
        rows = make_rows(options.rollouts, group, options.tokens)
        with tempfile.TemporaryDirectory() as folder:
            trainer = make_trainer(method, model, tokenizer, rows, group, folder)
            trainer._generate_single_turn = stand_in.sample
            trainer.model.train()
            measured = [stand_in.seconds(trainer, rows) for _ in range(options.repeats + 1)][1:]
        before, behind = min(measured, key=sum)
        row = {
            "method": method,
            "rollouts": options.rollouts,
            "tokens": options.tokens,
            "vocabulary": len(tokenizer),
            "before_s": round(before, 3),
            "behind_s": round(behind, 3),
            "host_s": round(before + behind, 3),
        }
        emit([{**row, **machine("cpu")}], options.output)


if __name__ == "__main__":
    main()
