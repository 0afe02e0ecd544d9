# SPDX-License-Identifier: Apache-2.0
"""What each target says where the embedded model slips: the probability of the right result and of the slip.

    python benchmarks/slip_signal.py

Takes wrong rollouts of the base on test problems, finds the first wrong result in each, and reads every target of the
papers there, from dense logits. Explains orderings in docs/miniature.md.
"""

import argparse
import re

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_opsd.demo import REFERENCE_ONLY_TEMPLATE, TEACHER_PROMPT_TEMPLATE, build_rows, model_path
from trl_opsd.demo.task import apply_operation
from trl_opsd.evaluation.sampling import generate_completions, render_prompt
from trl_opsd.losses import purified_logits, steered_logits
from trl_opsd.verification import verify

THINKING = {"enable_thinking": False}
STEP = re.compile(r"(\d+)([+*-])(\d+)=(\d+)\n")


def first_slip(tokenizer, text: str) -> tuple[list[int], int, int] | None:
    """Ids before the first wrong result of a rollout, the right token there and the slip's; None without one."""
    for step in STEP.finditer(text):
        left, operator, operand, result = step.groups()
        right = apply_operation(int(left), operator, int(operand))
        if right != int(result):
            before = text[: step.start(4)]
            wrong_ids = tokenizer(f"{before}{result}\n", add_special_tokens=False)["input_ids"]
            right_ids = tokenizer(f"{before}{right}\n", add_special_tokens=False)["input_ids"]
            place = next(i for i, (a, b) in enumerate(zip(wrong_ids, right_ids, strict=False)) if a != b)
            return right_ids[:place], right_ids[place], wrong_ids[place]
    return None


def targets_at(model, tokenizer, question: str, solution: str, right: str, wrong: str, ids: list[int]) -> dict:
    """Logits (V,) of every target behind `ids`."""

    @torch.no_grad()
    def read(template: str, text: str) -> torch.Tensor:
        content = template.format(prompt=question, solution=text)
        prompt = render_prompt(tokenizer, [{"role": "user", "content": content}], THINKING)
        return model(torch.tensor([prompt + ids])).logits[0, -1]

    plain = read("{prompt}", "")
    teacher, reference = read(TEACHER_PROMPT_TEMPLATE, solution), read(REFERENCE_ONLY_TEMPLATE, solution)
    positive = torch.stack([teacher, read(TEACHER_PROMPT_TEMPLATE, right)])
    negative = read(TEACHER_PROMPT_TEMPLATE, wrong)[None]
    return {
        "student (plain)": plain,
        "OPSD": teacher,
        "OGLS-SD, lambda 1": steered_logits(plain, positive, negative, strength=1.0),
        "OGLS-SD, lambda 3": steered_logits(plain, positive, negative, strength=3.0),
        "OGLS-SD, mean of positives": positive.mean(0),
        "OGLS-SD, positive only, lambda 3": steered_logits(plain, positive, plain[None], strength=3.0),
        "a wrong attempt in the slot": negative[0],
        "Purified OPSD": purified_logits(plain, teacher, reference),
        "Purified OPSD, nothing subtracted": purified_logits(plain, teacher, plain),
        "the solution without the problem": reference,
    }


def main() -> None:
    """Print a table of means over slips."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", type=int, default=200)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(model_path())
    model = AutoModelForCausalLM.from_pretrained(model_path()).eval()
    rows = build_rows("test", options.problems)
    settings = {"num_samples": 4, "max_new_tokens": 96, "batch_size": 512, "chat_template_kwargs": THINKING}
    groups = generate_completions(model, tokenizer, [row["prompt"] for row in rows], **settings)
    sums, count = {}, 0
    for row, group in zip(rows, groups, strict=True):
        texts = [sample.text for sample in group]
        right = [text for text in texts if verify(text, row["solution"])]
        wrong = [(text, slip) for text in texts if text not in right and (slip := first_slip(tokenizer, text))]
        if not right or not wrong:
            continue
        text, (ids, right_token, slip_token) = wrong[0]
        question = row["prompt"][0]["content"]
        count += 1
        for name, logits in targets_at(model, tokenizer, question, row["solution"], right[0], text, ids).items():
            p = logits.softmax(-1)
            entropy = -(p * p.clamp_min(1e-30).log()).sum()
            sums[name] = sums.get(name, 0) + torch.stack([p[right_token], p[slip_token], entropy])
    print(f"{count} slips\n\n| target | the right result | the slip | entropy, nats |\n|---|---|---|---|")
    for name, total in sums.items():
        print("| {} | {:.3f} | {:.3f} | {:.2f} |".format(name, *(total / count).tolist()))


if __name__ == "__main__":
    main()
