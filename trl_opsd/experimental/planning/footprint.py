# SPDX-License-Identifier: Apache-2.0
"""What a model of a config weighs and what its forwards hold, without weights.

Parameters are counted on the meta device; what a forward keeps for its backward, and what both hold while they run, is read
from fake tensors. All is done with one and two layers, the latter on three lengths, which gives the part of a layer, of a
token and of a pair of tokens, exactly where a model is the same layer many times over. On fake tensors transformers
makes the attention mask that a padded batch has; it is what grows with the pairs.
"""

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config

from ...model.heads import cache_of, causal_lm

# The published shapes: hidden size, layers, heads, key-value heads, intermediate size, tied embeddings.
_QWEN3 = {
    "Qwen3-1.7B": (2048, 28, 16, 8, 6144, True),
    "Qwen3-4B": (2560, 36, 32, 8, 9728, True),
    "Qwen3-8B": (4096, 36, 32, 8, 12288, False),
    "Qwen3-32B": (5120, 64, 64, 8, 25600, False),
}
SHAPES = tuple(_QWEN3)
_LENGTHS = (257, 1025, 4097)  # no model's width, so that no activation has a weight's shape


def load_config(name: str) -> Any:
    """The config of a shape of `SHAPES` (also "Qwen/..."), or of a model folder or Hub id."""
    shape = _QWEN3.get(name.removeprefix("Qwen/"))
    if shape is None:
        return AutoConfig.from_pretrained(name)
    hidden, layers, heads, kv_heads, intermediate, tied = shape
    return Qwen3Config(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        vocab_size=151_936,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    )


@dataclass(frozen=True)
class Growth:
    """Bytes that grow with the length of a row.

    Attributes:
        fixed: whatever the rows, such as weights cast by autocast.
        token: of each token.
        pair: of each pair of a token and one that it may attend to.
    """

    fixed: float = 0.0
    token: float = 0.0
    pair: float = 0.0

    @classmethod
    def through(cls, lengths: Sequence[int], counts: Sequence[float]) -> "Growth":
        """The parabola through three counts of a row."""
        (a, b, c), (x, y, z) = lengths, counts
        first, second = (y - x) / (b - a), (z - y) / (c - b)
        pair = (second - first) / (c - a)
        token = first - pair * (a + b)
        return cls(x - token * a - pair * a * a, token, pair)

    @classmethod
    def above(cls, lengths: Sequence[int], counts: Sequence[float]) -> "Growth":
        """Exact at the first and the last of some lengths, not below a peak that changes its place between them."""
        per_token = counts[0] / lengths[0], counts[-1] / lengths[-1]
        pair = (per_token[1] - per_token[0]) / (lengths[-1] - lengths[0])
        return cls(0.0, per_token[0] - pair * lengths[0], pair)

    def at(self, rows: float, length: int, attended: int | None = None) -> float:
        """Bytes of rows of a length, whose tokens attend to so many (None: to their own row)."""
        return self.fixed + rows * length * (self.token + self.pair * (length if attended is None else attended))

    def __add__(self, other: "Growth") -> "Growth":
        return Growth(self.fixed + other.fixed, self.token + other.token, self.pair + other.pair)

    def __mul__(self, times: float) -> "Growth":
        return Growth(self.fixed * times, self.token * times, self.pair * times)


@dataclass(frozen=True)
class Footprint:
    """Counts and bytes of one model in one precision.

    Attributes:
        parameters: all of them, tied ones once, adapters included.
        trainable: those that train.
        layer_parameters: of one layer.
        head: entries (V, H) of the output head.
        head_trains: whether the head is among the trainable.
        num_layers: decoder layers.
        parameter_bytes: of one parameter of the base.
        adapter_bytes: of one trainable parameter.
        hidden_bytes: of one element of the hidden states.
        head_tied: whether the head's weight is the input embedding's.
        saved_layer: what one layer keeps for its backward.
        saved_rest: what the rest keeps.
        backward: what a backward holds at its peak above that, the largest gradient of a layer's weight among it.
        running: what a forward without gradients holds at its peak.
        cache: bytes a token of the KV cache, all layers.
    """

    parameters: int
    trainable: int
    layer_parameters: int
    head: tuple[int, int]
    head_trains: bool
    num_layers: int
    parameter_bytes: int
    adapter_bytes: int
    hidden_bytes: int
    head_tied: bool
    saved_layer: Growth
    saved_rest: Growth
    backward: Growth
    running: Growth
    cache: float


def measure_footprint(config: Any, dtype: torch.dtype, *, autocast: bool = True, peft_config: Any = None) -> Footprint:
    """Read a config's footprint.

    Args:
        config: of a dense decoder-only model.
        dtype: of its parameters.
        autocast: whether it runs under bfloat16 autocast.
        peft_config: of the adapter that trains; None trains every parameter.

    Raises:
        ValueError: the model cannot be traced, as one that routes tokens by their values cannot.
    """
    layers = config.get_text_config().num_hidden_layers
    one, two = (meta_model(_with_layers(config, count), dtype, peft_config) for count in (1, 2))
    try:
        traces = [[_trace(model, length, autocast) for length in _LENGTHS] for model in (one, two)]
    except RuntimeError as error:
        raise ValueError(f"model: {config.model_type} cannot be planned without its weights ({error}).") from error
    saved, running = (
        [Growth.through(_LENGTHS, [getattr(trace, name) for trace in row]) for row in traces]
        for name in ("saved", "running")
    )
    backward = Growth.above(_LENGTHS, [trace.peak - trace.saved for trace in traces[0]])
    layer = saved[1] + saved[0] * -1
    casts = running[1].fixed - running[0].fixed  # autocast keeps every layer's
    total, trainable = (
        _count(one, trained) + (layers - 1) * (_count(two, trained) - _count(one, trained)) for trained in (False, True)
    )
    head = causal_lm(one).get_output_embeddings().weight
    inputs = causal_lm(one).get_input_embeddings().weight
    return Footprint(
        parameters=total,
        trainable=trainable,
        layer_parameters=_count(two, False) - _count(one, False),
        head=tuple(head.shape),
        head_trains=head.requires_grad,
        num_layers=layers,
        parameter_bytes=dtype.itemsize,
        adapter_bytes=next(p for p in one.parameters() if p.requires_grad).dtype.itemsize,
        hidden_bytes=traces[0][0].hidden_bytes,
        head_tied=head is inputs,
        saved_layer=layer,
        saved_rest=saved[0] + layer * -1,
        backward=backward + Growth(_largest_gradient(one, autocast)),
        running=replace(running[0], fixed=max(0.0, running[0].fixed + (layers - 1) * casts)),
        cache=layers * traces[0][0].cache / _LENGTHS[0],
    )


def _with_layers(config: Any, count: int) -> Any:
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = count
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:count]
    return config


def meta_model(config: Any, dtype: torch.dtype, peft_config: Any = None) -> nn.Module:
    """A config's model without values, with an adapter where `peft_config` is given."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    if peft_config is not None:
        from peft import get_peft_model

        model = get_peft_model(model, copy.deepcopy(peft_config))
    return model.train()


def _count(model: nn.Module, trained_only: bool) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trained_only)


def _largest_gradient(model: nn.Module, autocast: bool) -> int:
    """Bytes of the largest gradient of a layer's weight, in the dtype it was computed in and in its own."""
    ends = [
        module.weight for module in (causal_lm(model).get_input_embeddings(), causal_lm(model).get_output_embeddings())
    ]
    layers = [p for p in model.parameters() if p.requires_grad and all(p is not end for end in ends)]
    return max((p.numel() * (p.dtype.itemsize + 2 * (autocast and p.dtype.itemsize > 2)) for p in layers), default=0)


class _Backbone(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, use_cache: bool):
        return causal_lm(self.model).base_model(input_ids=ids, use_cache=use_cache)


@dataclass(frozen=True)
class _Trace:
    saved: int
    peak: int
    running: int
    cache: int
    hidden_bytes: int


def _trace(model: nn.Module, length: int, autocast: bool) -> _Trace:
    """Bytes of one forward and its backward over `length` tokens on fake tensors."""
    with FakeTensorMode():
        state = {
            f"model.{name}": torch.empty(t.shape, dtype=t.dtype, device="cpu").requires_grad_(t.requires_grad)
            for name, t in [*model.named_parameters(), *model.named_buffers()]
        }
        for tensor in state.values():
            tensor.grad = torch.empty_like(tensor) if tensor.requires_grad else None  # so that a backward adds to it
        own = {tensor.untyped_storage()._cdata for tensor in state.values()}
        ids = torch.zeros(1, length, dtype=torch.long)
        saved: dict[int, Any] = {}

        def pack(tensor):
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage  # kept, so that its address is not given away
            return tensor

        def run(use_cache=False):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return functional_call(_Backbone(model), state, (ids, use_cache))

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = run().last_hidden_state
        kept, size = sum(storage.nbytes() for storage in saved.values()), hidden.element_size()
        del hidden
        saved.clear()
        with _PeakMode() as peak:
            hidden = run().last_hidden_state
            peak.ignored = {tensor.shape for tensor in state.values()}  # gradients of weights, counted on their own
            hidden.backward(torch.empty_like(hidden))
        del hidden
        with torch.no_grad(), _PeakMode() as forward:
            run()
        with torch.no_grad():
            layer = cache_of(run(True)).layers[0]
        cache = sum(getattr(layer, name).untyped_storage().nbytes() for name in ("keys", "values"))
        return _Trace(kept, peak.most, forward.most, cache, size)


class _PeakMode(TorchDispatchMode):
    """Most bytes that tensors made within it held at one time."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.ignored: set[torch.Size] = set()
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if not isinstance(tensor, torch.Tensor) or {tensor.shape, tensor.shape[::-1]} & self.ignored:
                continue
            if (storage := tensor.untyped_storage())._cdata not in known:
                self._add(storage)
        self.most = max(self.most, self.now)
        return output

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive:
            self._alive.add(key)
            self.now += size
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self._alive.discard(key)
        self.now -= size
