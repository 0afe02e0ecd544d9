# SPDX-License-Identifier: Apache-2.0
"""Time of the checks of all rows before training, by the limit that is set: seconds of one process, and of a second run.

python benchmarks/row_checks.py --rows 300000   # writes 6 GB to the folder of temporary files
"""

import argparse
import random
import tempfile
import time
from pathlib import Path
from statistics import mean

from datasets import Dataset, disable_progress_bars, load_dataset
from measuring import emit, machine
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from trl_opsd import OPSDConfig
from trl_opsd.demo.tokenizer import CHAT_TEMPLATE
from trl_opsd.rows.checks import check_dataset
from trl_opsd.rows.token_counts import TokenCounts
from trl_opsd.teacher.prompts import TeacherCollator
from trl_opsd.trainers.prompt_checks import check_prompts

FIRST_ROWS = 32
LIMITS = {
    "no row near": {"max_positions": 40_960},
    "bytes over the positions": {"max_positions": 4096},
    "bytes over, and a budget": {"max_positions": 4096, "max_teacher_prompt_length": 2048},
}


def write_rows(path: Path, num_rows: int) -> None:
    """Rows of 8 kB: a problem of 1,000 characters and a solution of 7,000, words by rank and a fifth of them numbers."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(1, 9))) for _ in range(20_000)]

    def text(length: int) -> str:
        parts, size = [], 0
        while size < length:
            is_word = draw.random() < 0.8
            rank = min(int(draw.paretovariate(0.7)), len(words) - 1)
            parts.append(words[rank] if is_word else f"{draw.randint(0, 99_999)}+{draw.randint(0, 9999)}")
            size += len(parts[-1]) + 1
        return " ".join(parts)

    texts = [text(7000) for _ in range(300)]

    def rows():
        for index in range(num_rows):
            problem, solution = draw.choice(texts)[:1000], draw.choice(texts)
            yield {"prompt": [{"role": "user", "content": f"{index} {problem}"}], "solution": f"{solution} {index}"}

    Dataset.from_generator(rows, cache_dir=str(path.parent / "made")).to_parquet(path)


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 16,000 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=16_000, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=special[0],
        additional_special_tokens=special[1:],
        chat_template=CHAT_TEMPLATE,
    )


def seconds(collator: TeacherCollator, dataset: Dataset) -> tuple[float, float]:
    """CPU and wall seconds of both passes over the rows."""
    start = time.process_time(), time.perf_counter()
    check_dataset(dataset, "train_dataset", needs_solution=True)
    check_prompts(collator, dataset, None)
    return time.process_time() - start[0], time.perf_counter() - start[1]


def seconds_of_first_rows(collator: TeacherCollator, dataset: Dataset) -> float:
    """CPU seconds until a first step's rows are checked, each of them rendered with every template."""
    first_rows = range(min(FIRST_ROWS, len(dataset)))
    start = time.process_time()
    check_prompts(collator, dataset.select(first_rows), None, first_rows=first_rows)
    return time.process_time() - start


def bound_and_encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> dict[str, float]:
    """Means over texts: tokens, the bound on them, and what each takes once the words are known."""
    counts = TokenCounts(tokenizer)
    counts.may_exceed(texts, 0)
    start = time.process_time()
    bounds = counts.pieces.bounds(texts)
    bounded = time.process_time()
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return {
        "bound": mean(bounds),
        "tokens": mean(map(len, encoded)),
        "bound_us": 1e6 * (bounded - start) / len(texts),
        "encode_us": 1e6 * (time.process_time() - bounded) / len(texts),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print a JSON line for each limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.parquet"
        write_rows(path, options.rows)
        dataset = load_dataset("parquet", data_files=str(path), split="train", cache_dir=folder)
        tokenizer = train_tokenizer(dataset[:100]["solution"])
        of_a_solution = bound_and_encode(tokenizer, dataset[:1000]["solution"])
        for name, limits in LIMITS.items():
            positions = limits["max_positions"]
            args = OPSDConfig(
                folder, bf16=False, use_cpu=True, max_teacher_prompt_length=limits.get("max_teacher_prompt_length")
            )
            collator = TeacherCollator.from_settings(tokenizer, args, max_positions=positions)
            at_once = seconds_of_first_rows(collator, dataset)
            (first, wall), (again, _) = (seconds(collator, dataset) for _ in range(2))
            row = {"limits": name, "rows": options.rows, "first_rows_s": at_once, "cpu_s": first, "wall_s": wall}
            emit([row | {"again_s": again, **of_a_solution, **machine("cpu")}], options.output)
        del dataset


if __name__ == "__main__":
    main()
