# SPDX-License-Identifier: Apache-2.0
"""Whose weights the teacher has.

One model plays both roles. The teacher is the student's module with other values in its trainable parameters: for the
time of scoring they are exchanged (or an adapter that changed nothing at the start is switched off), so frozen and adapted
layers exist once, and the teacher's values are sharded the way the student's are.

    base   the student as it starts: a fresh adapter off where that is the same model, otherwise a copy of the trainable
           parameters
    live   the student's values at the time of scoring
    ema    a moving average that starts from the student; of a LoRA pair the update B A is averaged, not A and B
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file, save_file
from torch import nn

from ..losses import OutputHead
from ..model.heads import causal_lm
from ..model.sharding import (
    exchange,
    first_ranks,
    gathered,
    is_sharded,
    local_part,
    part_of,
    plain_name,
    release,
    whole,
    whole_shape,
)
from .low_rank import average_low_rank, by_expert

# Parts of the names of what goes off with a LoRA adapter: the factors, DoRA's magnitudes, PEFT's copies of whole modules
# and of single tokens.
_OFF_WITH_LORA = re.compile(r"lora_(embedding_)?[AB]\.|lora_magnitude_vector\.|modules_to_save\.|token_adapter\.")
_SECOND_FACTOR = re.compile(r"(lora_(?:embedding_)?)B\.")


class Teacher:
    """The teacher's weights over the student's module.

    Args:
        kind: "base", "live" or "ema".
        student: the model, unwrapped; a PEFT model where adapters train.
        fresh_adapter: its adapter was just made; it is switched off for "base" if it changes nothing yet. A collective.
        update_rate: share of the student in an update of "ema", in (0, 1].
        keep_head: copy the head at each scoring because the loss will be taken after later updates.
    """

    def __init__(
        self,
        kind: str,
        student: nn.Module,
        *,
        fresh_adapter: bool = False,
        update_rate: float = 0.001,
        keep_head: bool = False,
    ):
        self.kind, self.student, self.update_rate = kind, student, update_rate
        self.adapter_off = kind == "base" and fresh_adapter and changes_nothing(student)
        self.keep_head = keep_head
        self.head: OutputHead | None = None
        head_module = causal_lm(student).get_output_embeddings()
        self._head_trains = any(parameter.requires_grad for parameter in head_module.parameters())
        self._pairs = self._find_pairs() if kind == "ema" else {}
        self._settled = False
        self.values = {} if kind == "live" or self.adapter_off else self._copy_of_student()

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context the student's module is the teacher, in evaluation mode; all is restored after it."""
        modes = [(module, module.training) for module in self.student.modules()]
        self.student.eval()
        self.head = None
        release(self.student)
        self._copies_head = self.keep_head or self._is_sharded()  # a gathered head is gone after the forward
        try:
            with self.student.disable_adapter() if self.adapter_off else nullcontext(), self._exchanged():
                yield
        finally:
            for module, training in modes:
                module.training = training

    def wants_head(self) -> bool:
        """Whether `observe_head` still has to see the head of this scoring: where it may differ from the student's."""
        same = self.kind == "live" and not self.keep_head
        return self._head_trains and not same and self.head is None

    def observe_head(self, head: OutputHead) -> None:
        """Remember, during scoring, the teacher's output head where it may differ from the student's."""
        if not self.wants_head():
            return
        weight, bias = (None if t is None else t.detach() for t in (head.weight, head.bias))
        if self._copies_head:
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        self.head = OutputHead(weight, bias, head.logit_scale, head.logit_softcap)

    @torch.no_grad()
    def update(self) -> float:
        """Move "ema" towards the student by `update_rate`; nothing for the other kinds.

        Returns:
            The largest relative size of what a LoRA pair's rank could not hold of its averaged update, 0 without LoRA.
        """
        if self.kind != "ema":
            return 0.0
        self._settle()
        lost = 0.0
        for name, parameter in self._trainable():
            if name not in self._pairs:
                own = self.values[name]
                own.lerp_(local_part(parameter).detach().to(own), self.update_rate)
        for name_a, name_b in self._pairs.items():
            if name_b is not None:
                lost = max(lost, self._update_pair(name_a, name_b))
        return lost

    def save(self, folder: str | Path) -> None:
        """Write the "ema" values into a checkpoint folder as safetensors; called on every rank.

        Whole values are written once; sharded ones (ZeRO-3, FSDP2) by each rank.
        """
        if self.kind != "ema":
            return
        self._settle()
        if self._is_sharded() or _rank() == 0:
            save_file({name: value.contiguous() for name, value in self.values.items()}, self._file(folder))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: the checkpoint was written without an "ema" teacher, or on another number of shards.
        """
        if self.kind != "ema":
            return
        self._settle()
        file = self._file(folder)
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing: the checkpoint was not written with teacher_model_kind='ema' on this engine and "
                "number of processes. Resume with the settings it was trained with."
            )
        for name, value in load_file(file).items():
            self.values[name].copy_(value)

    def _is_sharded(self) -> bool:
        return any(is_sharded(parameter) for _, parameter in self._trainable())

    def _file(self, folder: str | Path) -> Path:
        shard = f"-{_rank():05d}-of-{torch.distributed.get_world_size():05d}" if self._is_sharded() else ""
        return Path(folder) / f"teacher{shard}.safetensors"

    def _trainable(self):
        return ((plain_name(name), p) for name, p in self.student.named_parameters() if p.requires_grad)

    def _copy_of_student(self) -> dict[str, torch.Tensor]:
        # A moving average in bfloat16 would round its small steps away.
        dtype = {"ema": torch.float32}.get(self.kind)
        values = {}
        for name, parameter in self._trainable():
            with gathered([parameter] if name in self._pairs else []):
                own = whole(parameter) if name in self._pairs else local_part(parameter)
                values[name] = own.detach().clone().to(_at_least(own.dtype, dtype))
        return values

    def _find_pairs(self) -> dict[str, str | None]:
        """LoRA factors by name: of each A its B, of each B None. They are kept whole, being small."""
        pairs = {}
        for name, parameter in self._trainable():
            partner = name.replace("lora_A.", "lora_B.")
            if partner != name and len(whole_shape(parameter)) == 2:
                pairs |= {name: partner, partner: None}
        return pairs

    def _settle(self) -> None:
        """Lay the values out as the engine has laid out the student since they were copied: rank 0's, by shards."""
        release(self.student)
        for name, parameter in self._trainable():
            if name not in self.values:
                continue
            if not self._settled:
                self.values[name] = first_ranks(self.values[name], parameter)
            if name not in self._pairs:
                self.values[name] = part_of(self.values[name], parameter)
        self._settled = True

    @contextmanager
    def _exchanged(self) -> Iterator[None]:
        if self.values:
            self._settle()
        restore = [
            exchange(parameter, part_of(self.values[name], parameter))
            for name, parameter in self._trainable()
            if name in self.values
        ]
        try:
            yield
        finally:
            release(self.student)
            for put_back in restore:
                put_back()

    def _update_pair(self, name_a: str, name_b: str) -> float:
        """Average the update B A of one LoRA pair and refit it to the pair's rank; of experts, each one's."""
        parameters, experts = dict(self._trainable()), self._experts_of(name_a)
        pair = [parameters[name] for name in (name_a, name_b)]
        with gathered(pair):
            student = by_expert(*(whole(parameter).detach().float() for parameter in pair), experts)
            teacher = by_expert(self.values[name_a], self.values[name_b], experts)
            new_a, new_b, lost = average_low_rank(teacher, student, self.update_rate)
        for own, new in zip(teacher, (new_a, new_b), strict=True):
            own.copy_(new)  # views of the values
        return lost

    def _experts_of(self, name_a: str) -> int:
        """Experts whose weights are one parameter and whose LoRA factors PEFT lays beside each other; 1 elsewhere."""
        layer = name_a.split(".lora_A.")[0]
        return next(
            getattr(m, "num_experts", 1) for name, m in self.student.named_modules() if plain_name(name) == layer
        )


def changes_nothing(student: nn.Module) -> bool:
    """Whether a fresh adapter switched off is the same model as switched on; a collective.

    It is where all that trains is LoRA's, with every update B A zero, or a copy that PEFT put beside the original.
    PiSSA, OLoRA, CorDA and LoftQ take an update out of the weights below. Biases that train stay when the adapter is
    off. What another kind of adapter starts from is not known here.
    """
    parameters = dict(student.named_parameters())
    if any(parameter.requires_grad and not _OFF_WITH_LORA.search(name) for name, parameter in parameters.items()):
        return False
    updates = [  # each B with its A; a bias of B has none
        [parameters[part] for part in {name, _SECOND_FACTOR.sub(r"\1A.", name)} if part in parameters]
        for name in parameters
        if _SECOND_FACTOR.search(name)
    ]
    with gathered([factor for factors in updates for factor in factors]):
        changes = any(all(_holds_values(factor) for factor in factors) for factors in updates)
    return not any(gather_object([changes]))  # a rank that waits for rank 0's model may see zeros


def _holds_values(parameter: torch.Tensor) -> bool:
    """Whether anything but zeros is in it, once it is gathered."""
    return not parameter.is_meta and bool(whole(parameter).any())


def _at_least(dtype: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return dtype if wanted is None else torch.promote_types(dtype, wanted)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
