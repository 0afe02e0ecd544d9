# SPDX-License-Identifier: Apache-2.0
"""Which positions of a rollout push accuracy up, and which down: digit reversal, to first order.

    python benchmarks/accuracy_push.py --base few [--rollouts 48]

Every letter of a solution is forced, so the expected accuracy at temperature 1 is a function of the weights with a gradient.
The inner product of that gradient and a step down the loss of some positions says what the step does to accuracy; parts
of the rollouts add up to the cosine of the whole. Also what student and teacher say in each part.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from digit_reversal import (
    TEST_PROBLEMS,
    WARM_SHARES,
    answer_log_probs,
    build_rows,
    ids_of_solution,
    measure,
    place_of_error,
    warm,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE
from trl_opsd.evaluation.sampling import render_prompt
from trl_opsd.losses import Divergence, purified_logits
from trl_opsd.losses.divergences import divergence_terms

THINKING = {"enable_thinking": True}
PARTS = ("right rollouts", "before the first error", "at it", "behind it")
LOSSES = (("OPSD", "forward_kl"), ("OPSD", "reverse_kl"), ("OPSD", "jsd"), ("Purified OPSD", "jsd"))


class Positions(NamedTuple):
    """All positions of all rollouts: logits (N, V) of the views, the part (N,), and two tokens (N,)."""

    student: torch.Tensor
    teacher: torch.Tensor
    reference: torch.Tensor
    part: torch.Tensor
    right: torch.Tensor  # of the solution at that place
    sampled: torch.Tensor


def read_rollouts(model, tokenizer, rows: list[dict]) -> Positions:
    """Sample one rollout a row and read every view along it."""
    columns = []
    for row, (completion,) in zip(
        rows, measure(model, tokenizer, rows, THINKING, seed=5, samples=1).completions, strict=True
    ):
        right, question = ids_of_solution(tokenizer, row["solution"]), row["prompt"][0]["content"]
        ids = tokenizer(completion.text, add_special_tokens=False)["input_ids"]
        ids += [] if completion.is_cut else [tokenizer.eos_token_id]
        error = place_of_error(ids, right)

        def read(template, row=row, question=question, ids=ids):
            text = template.format(prompt=question, solution=row["solution"])
            prompt = render_prompt(tokenizer, [{"role": "user", "content": text}], THINKING)
            return model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]

        with torch.no_grad():
            teacher, reference = read(TEACHER_PROMPT_TEMPLATE), read(REFERENCE_ONLY_TEMPLATE)
        places = range(len(ids))
        parts = [0 if error == len(ids) else 1 + (place >= error) + (place > error) for place in places]
        answer = [right[place] if place < len(right) else tokenizer.eos_token_id for place in places]
        columns.append((read("{prompt}"), teacher, reference, *map(torch.tensor, (parts, answer, ids))))
    return Positions(*map(torch.cat, zip(*columns, strict=True)))


def flat_gradient(model, value: torch.Tensor) -> torch.Tensor:
    """Gradient of `value` with respect to all weights, as one vector."""
    return torch.cat([part.flatten() for part in torch.autograd.grad(value, [*model.parameters()], retain_graph=True)])


def print_pushes(model, positions: Positions, accuracy: torch.Tensor) -> None:
    """A line a loss: cosine of its step with accuracy's gradient, and each part's share of loss, gradient and cosine."""
    wanted = flat_gradient(model, accuracy)
    targets = {
        "OPSD": positions.teacher,
        "Purified OPSD": purified_logits(positions.student.detach(), positions.teacher, positions.reference),
    }
    print("| loss | cosine | " + " | ".join(f"{part}: loss, gradient, push" for part in PARTS) + " |")
    for name, divergence in LOSSES:
        log_q, log_p = positions.student.log_softmax(-1), targets[name].log_softmax(-1)
        loss = divergence_terms(log_q, log_p, Divergence(divergence)).sum(-1)
        chosen = [loss[positions.part == part].sum() for part in range(len(PARTS))]
        gradients = [flat_gradient(model, value) for value in chosen]
        total = sum(gradients)
        scale = total.norm() * wanted.norm()
        cells = [
            f"{value.item() / loss.sum().item():.2f}, {gradient.norm() / total.norm():.2f}, {-(gradient @ wanted) / scale:+.3f}"
            for value, gradient in zip(chosen, gradients, strict=True)
        ]
        print(f"| {name}, {divergence} | {-(total @ wanted) / scale:+.3f} | " + " | ".join(cells) + " |", flush=True)


def print_views(positions: Positions) -> None:
    """A line a part: probabilities of the right and the sampled token, entropies."""
    q, p = positions.student.detach().softmax(-1), positions.teacher.softmax(-1)
    columns = {
        "student: right token": q.gather(1, positions.right[:, None])[:, 0],
        "teacher: right token": p.gather(1, positions.right[:, None])[:, 0],
        "teacher: sampled token": p.gather(1, positions.sampled[:, None])[:, 0],
        "student's entropy": torch.special.entr(q).sum(-1),
        "teacher's entropy": torch.special.entr(p).sum(-1),
    }
    print(f"| part | positions | {' | '.join(columns)} |")
    for part, name in enumerate(PARTS):
        here = positions.part == part
        cells = " | ".join(f"{column[here].mean():.3f}" for column in columns.values())
        print(f"| {name} | {here.sum()} | {cells} |")


def main() -> None:
    """Print both tables for one base."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", choices=WARM_SHARES, default="few")
    parser.add_argument("--rollouts", type=int, default=48)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/digit_reversal"))
    options = parser.parse_args()
    path = warm(options.base, options.output_dir, thinking=True)
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path).eval()
    accuracy = answer_log_probs(model, tokenizer, build_rows("test", TEST_PROBLEMS)[:100], thinking=True).exp().mean()
    print(f"{options.base}: expected accuracy {accuracy.item():.3f}")
    positions = read_rollouts(model, tokenizer, build_rows("train", options.rollouts))
    print_views(positions)
    print_pushes(model, positions, accuracy)


if __name__ == "__main__":
    main()
