# SPDX-License-Identifier: Apache-2.0
"""SPD (arXiv 2605.22675): a model samples with keys and values projected onto what its right answers depend on.

The gradients of the answer's loss by keys and values, at all positions of some rows, span the subspace. The projection is folded
into a copy of the model, which samples; SFT starts from the model as it was.
"""

import argparse
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from ..errors import UsageError
from ..evaluation.sampling import render_prompt
from ..losses.subspace import fold_projection, sensitive_projection
from ..rows.token_texts import text_ends
from ..verification.answers import last_box
from .mixsd import Coin

NAMES = ("folded model",)
_PROJECTED = re.compile(r"layers\.(\d+)\..*\b(?:k_proj|v_proj)")


def check(options: argparse.Namespace) -> None:
    """Raise a UsageError for a share outside its range."""
    if not 0 < options.rank_share <= 1:
        raise UsageError(f"--rank_share {options.rank_share}: set it above 0 and at most 1.")


def projected_layers(model: Any, layers: Sequence[int] | None) -> dict[str, torch.nn.Linear]:
    """The linear layers of keys and values whose output is projected, by name.

    Args:
        model: a causal language model.
        layers: numbers of its blocks, from 0; None for the middle and the last.

    Raises:
        ValueError: it has no such layers, or no such block.
    """
    found = {
        name: (int(match[1]), module)
        for name, module in model.named_modules()
        if (match := _PROJECTED.search(name)) and isinstance(module, torch.nn.Linear)
    }
    blocks = sorted({block for block, _ in found.values()})
    if not blocks:
        raise ValueError(
            f"{type(model).__name__} has no linear layers k_proj and v_proj, which SPD folds. Take a model that keeps keys and "
            "values apart."
        )
    wanted = {blocks[len(blocks) // 2], blocks[-1]} if layers is None else set(layers)
    if not wanted <= set(blocks):
        raise ValueError(f"--layers {sorted(wanted)}: the model has the blocks {blocks[0]} to {blocks[-1]}.")
    return {name: module for name, (block, module) in found.items() if block in wanted}


def decisive_tokens(tokenizer: Any, ids: Sequence[int], solution: str) -> list[bool]:
    """Of each token of a solution whether it touches the content of its last box."""
    answer = last_box(solution)
    if not answer:
        return [False] * len(ids)
    start = solution.rfind(f"{{{answer}}}") + 1
    ends = text_ends(tokenizer, ids)
    places = zip((0, *ends), ends, strict=False)
    return [max(first, start) < min(last, start + len(answer)) for first, last in places]


def gradient_grams(
    model: Any, layers: Mapping[str, torch.nn.Linear], rows: Iterable[tuple[list[int], list[bool]]]
) -> dict[str, torch.Tensor]:
    """G' G of each layer's output, where a row of G is the gradient of an answer's mean loss at one position.

    Args:
        model: in evaluation mode.
        layers: of `projected_layers`.
        rows: token ids of prompt and solution, and which of them are decisive; the first never is.
    """
    grams = {name: torch.zeros(2 * (layer.out_features,), dtype=torch.float64) for name, layer in layers.items()}
    outputs: dict[str, torch.Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, given: Any, output: torch.Tensor) -> None:
            outputs[name] = output

        return hook

    hooks = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        for ids, is_decisive in rows:
            tokens = torch.tensor([ids], device=model.device)
            with torch.enable_grad():
                decisive = torch.tensor(is_decisive[1:], device=model.device)
                loss = cross_entropy(model(input_ids=tokens).logits[0, :-1][decisive], tokens[0, 1:][decisive])
                gradients = torch.autograd.grad(loss, [outputs[name] for name in layers])
            for name, gradient in zip(layers, gradients, strict=True):
                flat = gradient[0].double().cpu()
                grams[name] += flat.T @ flat
    finally:
        for hook in hooks:
            hook.remove()
    return grams


def fold(model: Any, layers: Mapping[str, torch.nn.Linear], rows: Any, rank_share: float) -> None:
    """Project keys and values of a model, in place.

    Args:
        model, layers, rows: see `gradient_grams`.
        rank_share: of the dimensions that stay, in (0, 1]; at 1 the model stays as it is.
    """
    for name, gram in gradient_grams(model, layers, rows).items():
        fold_projection(layers[name], sensitive_projection(gram, max(1, round(rank_share * len(gram)))))


def calibration(tokenizer: Any, rows: Sequence[Mapping[str, Any]], bare: Any, chat: Mapping[str, Any]) -> list:
    """Token ids and decisive tokens of the rows whose solution has a box with something in it."""
    read = []
    for row in rows:
        told = tokenizer(row.get("solution") or "", add_special_tokens=False)["input_ids"]
        marks = decisive_tokens(tokenizer, told, row.get("solution") or "")
        if any(marks):
            asked = render_prompt(tokenizer, bare(row), chat)
            read.append((asked + list(told), [False] * len(asked) + marks))
    if not read:
        raise ValueError(
            f"none of the first {len(rows)} rows has a solution with a boxed answer, which SPD is calibrated on."
        )
    return read


def make_source(options: argparse.Namespace, bare: Any, chat: Mapping[str, Any], rows: Sequence[Mapping]) -> Any:
    """The folded copy, made where it is not there yet, and read from its folder.

    Args:
        options: of `trl-opsd build spd`.
        bare: from a row to its prompt as the student reads it.
        chat: keyword arguments of the chat template.
        rows: of the dataset; the first of them calibrate.
    """
    from ..commands.eval.run import load_model
    from .build import Source

    folder = Path(f"{options.output}.folded")
    if not folder.exists():
        model, tokenizer = load_model(options.model_name_or_path, options.dtype)
        model.eval()
        used = calibration(tokenizer, rows[: options.calibration_rows], bare, chat)
        fold(model, projected_layers(model, options.layers), used, options.rank_share)
        print(f"calibrated on {len(used)} rows; the folded copy is {folder}")
        unfinished = folder.with_name(f"{folder.name}.part")
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.replace(folder)
    model, tokenizer = load_model(str(folder), options.dtype)
    model.eval()
    return Source(
        NAMES, (model,), lambda row: [render_prompt(tokenizer, bare(row), chat)], lambda: Coin(1.0), tokenizer
    )
