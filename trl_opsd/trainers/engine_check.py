# SPDX-License-Identifier: Apache-2.0
"""Whether vLLM samples from the weights that train: its log-probabilities of some rollouts beside the trainer's own."""

from collections.abc import Mapping
from typing import Any

import torch

from ..evaluation.sampling import evaluation_mode
from ..losses.truncation import truncated_log_probs

_ROWS, _TOKENS = 2, 256  # of each rank, that are compared
# Nats a token, in the mean. Equal weights in bfloat16 differ by 0.03 at most (docs/vllm.md), and an engine of 8 bits or of experts by a
# few times that; other weights by whole nats. At 0.25 an importance weight would be off by 28 % on average, and nothing that TRL's
# correction does then is small.
LARGEST_DIFFERENCE = 0.25


class EngineCheck:
    """Compares at the first generation batch of a process, and at the 2nd, 4th, 8th ...

    A fresh adapter adds nothing at first, so that an engine which never gets it shows at a later one alone.

    Args:
        model: the student.
        accelerator: of the trainer.
        args: of the run; read are what sampling depends on.
    """

    def __init__(self, model: torch.nn.Module, accelerator: Any, args: Any):
        self.model, self.accelerator, self.args = model, accelerator, args
        self._seen = 0

    def check(self, batch: Mapping[str, Any], step: int) -> dict[str, float]:
        """Numbers for the log, empty where nothing is compared; a collective.

        Args:
            batch: of one generation, with what the engine reported.
            step: optimizer steps so far.

        Raises:
            ValueError: engine and trainer disagree; names both means and what to look at.
        """
        self._seen += 1
        if self._seen & (self._seen - 1) or not self._is_comparable(batch):
            return {}
        sums = torch.zeros(4, dtype=torch.float64, device=self.accelerator.device)
        with evaluation_mode(self.model), torch.no_grad():
            for row in range(min(_ROWS, len(batch["completion_ids"]))):  # as many forwards on every rank
                sums += self._sums_of(batch, row)
        difference, engine, own, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if count == 0:
            return {}
        difference, engine, own = difference / count, engine / count, own / count
        if not difference <= LARGEST_DIFFERENCE:
            raise ValueError(_message(difference, engine, own, int(count), step))
        return {"engine/log_prob_difference": difference}

    def _is_comparable(self, batch: Mapping[str, Any]) -> bool:
        """Whether the engine reported, and sampled by nothing that is not computed here."""
        others = ("generation_kwargs", "vllm_structured_outputs_regex", "vllm_guided_decoding_regex")
        plain = self.args.repetition_penalty == 1 and not any(getattr(self.args, name, None) for name in others)
        return plain and batch.get("sampling_per_token_logps") is not None

    def _sums_of(self, batch: Mapping[str, Any], row: int) -> torch.Tensor:
        """|engine - own|, engine, own and number of a row's tokens that the model wrote."""
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        length = min(_TOKENS, batch["completion_ids"].size(1))
        tokens, written = batch["completion_ids"][row, :length], batch["completion_mask"][row, :length]
        if batch.get("tool_mask") is not None:
            written = written * batch["tool_mask"][row, :length]
        ids = torch.cat([prompt, tokens]).unsqueeze(0)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        names = ("temperature", "top_k", "top_p", "min_p")
        own = truncated_log_probs(logits, tokens, **{name: getattr(self.args, name) for name in names}).double()
        engine = batch["sampling_per_token_logps"][row, :length].double()
        used = written.bool() & engine.isfinite()  # vLLM reports no number now and then
        engine, own = engine[used], own[used]
        return torch.stack([(engine - own).abs().sum(), engine.sum(), own.sum(), used.double().sum()])


def _message(difference: float, engine: float, own: float, count: int, step: int) -> str:
    return (
        f"vLLM does not sample from the weights that train: at step {step} its log-probabilities of {count} tokens that it sampled are "
        f"{engine:.3f} in the mean, and the trainer's of the same tokens are {own:.3f}; they differ by {difference:.3f} nats a token, more "
        f"than {LARGEST_DIFFERENCE}, where the same weights in bfloat16 differ by about 0.03. Look at: which model a server serves "
        "(vllm_server_base_url) and that it has --logprobs-mode processed_logprobs; whether LoRA reaches the engine (TRL sends merged "
        "weights; with modules_to_save, quantised bases or FSDP try a run without them); the engine's dtype and quantisation; and "
        "vllm_model_impl. docs/vllm.md says more."
    )
