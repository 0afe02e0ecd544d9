# SPDX-License-Identifier: Apache-2.0
"""Run a function of the hidden states inside a causal LM's own forward.

The loss needs the final hidden states and the output head, never the logits. It is computed inside the (wrapped)
model's forward because that is where every engine has the head whole and its gradient hooks armed: DDP's bucket hooks,
DeepSpeed ZeRO-3's gathered parameters, FSDP2's unsharded parameters.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from ..losses import OutputHead
from .sharding import call_within, gathered, whole, whole_shape

HeadFunction = Callable[[torch.Tensor, OutputHead | None], Any]


class _Request:
    """What the next forward of a patched model is asked to do."""

    def __init__(self, function: HeadFunction, keep_forward: bool, with_head: bool):
        self.function, self.keep_forward, self.with_head = function, keep_forward, with_head
        self.result, self.cache = None, None


def causal_lm(model: nn.Module) -> nn.Module:
    """The transformers causal LM inside `model`, below any PEFT wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def attach_head_function(model: nn.Module) -> None:
    """Patch `model`'s forward so that `head_function` can reach its hidden states. Idempotent.

    Args:
        model: a transformers causal LM, or a PEFT model around one.

    Raises:
        ValueError: the model has no separate backbone or no linear output head, an adapter sits on the head, or one puts
            virtual tokens in front.
    """
    adapter = getattr(model, "active_peft_config", None)
    if adapter is not None and adapter.is_prompt_learning:  # hidden states that stand for no token of the ids
        raise ValueError(
            f"peft_config: {type(adapter).__name__} puts virtual tokens in front of what the model reads: the token-level "
            "loss would take other positions, and with them on or off the model is not the initial one. Use an adapter "
            "of weights, for instance LoraConfig."
        )
    model = causal_lm(model)
    if hasattr(model, "_head_request"):
        return
    head = model.get_output_embeddings()
    if head is None or not hasattr(head, "weight") or model.base_model is model:
        raise ValueError(
            f"model: {type(model).__name__} has no backbone with a linear output head, which the token-level loss "
            "needs. Use a decoder-only model of AutoModelForCausalLM."
        )
    if hasattr(head, "base_layer") or hasattr(head, "token_adapter"):  # its `weight` leaves the adapter's part out
        raise ValueError(
            f"model: the output head carries an adapter ({type(head).__name__}), which the token-level loss would not "
            "see. Take the head out of target_modules, and put it in modules_to_save to train it."
        )
    original = model.forward

    @functools.wraps(type(model).forward)  # `generate` reads the signature
    def forward(self, *args, **kwargs):
        request = self._head_request
        if request is None:
            return original(*args, **kwargs)
        if request.keep_forward:
            return _forward_and_capture(self, original, request, args, kwargs)
        output = self.base_model(*args, **{"use_cache": False, **kwargs})
        request.cache = cache_of(output)
        request.result = _call(request, self, output.last_hidden_state)
        # A tensor in the output keeps DDP's and DeepSpeed's output hooks working.
        return {"loss": request.result if isinstance(request.result, torch.Tensor) else request.result[0]}

    model._head_request = None
    model.forward = MethodType(forward, model)


def cache_of(output: Any) -> Any:
    """The keys and values that a forward returned, or None; transformers 5.24 calls them `cache`, before `past_key_values`."""
    return next((output[name] for name in ("cache", "past_key_values") if name in output), None)


def cache_argument(model: nn.Module) -> str:
    """What a causal LM's forward calls the keys and values that it continues."""
    parameters = inspect.signature(causal_lm(model).base_model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


@contextmanager
def head_function(
    model: nn.Module, function: HeadFunction, *, keep_forward: bool = False, with_head: bool = True
) -> Iterator[_Request]:
    """Within the context, a forward of `model` (however wrapped) calls `function(hidden, head)`.

    Args:
        model: the unwrapped model given to `attach_head_function`.
        function: takes hidden states (B, S, H) and an `OutputHead`; returns a tensor or a tuple that starts with one.
        keep_forward: run the model's own forward too and return its output; otherwise only the backbone runs.
        with_head: gather the head; without it the function is given None. The same on every rank.

    Yields:
        An object whose `result` holds what `function` returned last and whose `cache` is the KV cache of a forward
        that was called with `use_cache=True`, else None.
    """
    model = causal_lm(model)
    request = _Request(function, keep_forward, with_head)
    model._head_request = request
    try:
        yield request
    finally:
        model._head_request = None


def head_shape(model: nn.Module) -> tuple[int, int]:
    """(V, H) of the output head, also where an engine holds it sharded."""
    return tuple(whole_shape(causal_lm(model).get_output_embeddings().weight))


def caps_logits(model: nn.Module) -> bool:
    """Whether the output head is not linear, so that the mean of logits is not the head of a mean hidden state."""
    return _logit_transform(causal_lm(model).config)[1] is not None


def _forward_and_capture(model, original, request, args, kwargs):
    captured = []
    hook = model.base_model.register_forward_hook(lambda module, inputs, output: captured.append(output))
    try:
        output = original(*args, **kwargs)
    finally:
        hook.remove()
    request.result = _call(request, model, captured[-1].last_hidden_state)
    return output


@contextmanager
def whole_head(model: nn.Module) -> Iterator[OutputHead]:
    """The output head of `model`, gathered for the time of the context where it is sharded; a collective there."""
    model = causal_lm(model)
    head = model.get_output_embeddings()
    weight, bias = head.weight, getattr(head, "bias", None)
    with gathered([weight, bias]):
        yield OutputHead(whole(weight), whole(bias), *_logit_transform(model.config))


def _call(request: _Request, model: nn.Module, hidden: torch.Tensor) -> Any:
    head = model.get_output_embeddings()

    def function(hidden):
        if not request.with_head:
            return request.function(hidden, None)
        weight, bias = head.weight, getattr(head, "bias", None)
        with gathered([weight, bias]):  # one gather a forward, not one a tile
            assert not isinstance(weight, DTensor), "a sharded head outside of FSDP2's hooks has no gradient"
            return request.function(hidden, OutputHead(weight, bias, *_logit_transform(model.config)))

    if request.keep_forward and not isinstance(head.weight, DTensor):
        return function(hidden)  # FSDP2 has the head whole from the model's own forward; a second call is no group's
    return call_within(head, function, hidden)


def _logit_transform(config) -> tuple[float, float | None]:
    """(logit_scale, logit_softcap) as the families of transformers spell them; checked by `check_output_head`."""
    config = config.get_text_config()
    softcap = getattr(config, "final_logit_softcapping", None)
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name)), softcap
    scaling = getattr(config, "logits_scaling", None)
    if scaling is not None:
        return (float(scaling) if config.model_type == "hyperclovax" else 1.0 / float(scaling)), softcap
    return 1.0, softcap


@torch.no_grad()
def check_output_head(model: nn.Module, forward: Callable, token_ids: torch.Tensor) -> None:
    """Compare the model's own logits with the head applied to its hidden states, once, before training.

    Args:
        model: the unwrapped, patched model.
        forward: what runs it (the model or its engine), called with `input_ids` and `attention_mask`.
        token_ids: (1, S) a few token ids.

    Raises:
        ValueError: the two differ, so a loss from hidden states would be another model's loss.
    """
    with head_function(model, lambda hidden, head: head.logits(hidden), keep_forward=True) as request:
        logits = forward(input_ids=token_ids, attention_mask=torch.ones_like(token_ids)).logits
    ours, own = request.result[:, -1].float(), logits[:, -1].float()
    error = (ours - own).masked_fill(ours == own, 0.0).abs().max().item()  # of a token's -inf too
    if not error <= 0.02 * own.masked_fill(own.isinf(), 0.0).abs().max().item() + 1e-3:
        raise ValueError(
            f"model: the logits of {type(causal_lm(model)).__name__} are not its output head applied to its last "
            f"hidden state (largest difference {error:.3g}), which the token-level loss relies on. This architecture "
            "is not supported yet."
        )
