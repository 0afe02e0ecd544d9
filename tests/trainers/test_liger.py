# SPDX-License-Identifier: Apache-2.0
"""Liger's layer kernels change nothing but speed; what would take the loss its hidden states is refused by name.

The kernels themselves need a GPU. A stand-in patches a model as Liger does: layers in place, and the forward unless it is
told not to.
"""

import sys
from types import MethodType, ModuleType

import pytest
import torch
import transformers.integrations.liger
from peft import LoraConfig

from trl_opsd import OPSDTrainer
from trl_opsd._trl import versions
from trl_opsd.trainers import kernels

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`use_liger_kernel=True` is deprecated:FutureWarning"
    ),  # TRL 1.16 prefers the Hub's
    pytest.mark.skipif(not versions.is_newer((1, 15)), reason="this TRL takes a loss of Liger's own"),
]


def _norm(self, hidden_states):
    """What Liger computes in a kernel, in another order of operations than transformers."""
    scale = (hidden_states.square().sum(-1, keepdim=True) / hidden_states.size(-1) + self.variance_epsilon).rsqrt()
    return hidden_states * (self.weight * scale)


def _patch(model, calls, fused_linear_cross_entropy=True, rms_norm=True):
    calls.append((fused_linear_cross_entropy, rms_norm))
    if fused_linear_cross_entropy:
        model.forward = MethodType(lambda self, *args, **kwargs: type(self).forward(self, *args, **kwargs), model)
    for module in model.modules():
        if rms_norm and type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_norm, module)


@pytest.fixture
def installed(monkeypatch):
    """Have the stand-in for Liger, and a GPU to a check that asks for one; the calls it got."""
    calls, module = [], ModuleType("liger_kernel.transformers")
    module._apply_liger_kernel_to_instance = lambda model, **settings: _patch(model, calls, **settings)
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", module)
    for owner in (kernels, transformers.integrations.liger):
        monkeypatch.setattr(owner, "is_liger_kernel_available", lambda: True)
    monkeypatch.setattr(kernels, "_has_gpu", lambda args: True)
    return calls


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("weight", [0.0, 0.5], ids=["distilled", "with a reward"])
def test_a_run_with_layer_kernels_is_the_run_without(build, installed, lora, weight):
    settings = {"max_steps": 3, "learning_rate": 0.1, "optim": "sgd", "reward_weight": weight, "num_generations": 2}
    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if lora else None
    weights = []
    for kernel in (False, True):
        trainer = build(use_liger_kernel=kernel, peft_config=adapter, **settings)
        start = torch.cat([p.detach().flatten().clone() for p in trainer.model.parameters()])
        trainer.train()
        weights.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    assert installed == [(False, True)]
    assert any("forward" in vars(m) for m in trainer.model.modules() if "Norm" in type(m).__name__)
    torch.testing.assert_close(*weights, rtol=0, atol=1e-4 * (weights[0] - start).abs().max().item())


def test_kernels_that_are_switched_off_stay_off(build, installed):
    build(use_liger_kernel=True, liger_kernel_config={"rms_norm": False}).train()
    assert installed == [(False, False)]


def test_the_forward_that_liger_puts_in_by_default_would_leave_the_loss_without_hidden_states(
    build, installed, monkeypatch
):
    """Why it is switched off."""
    trainer = build(use_liger_kernel=True)
    trainer.args.liger_kernel_config = None
    with pytest.raises(TypeError, match="'NoneType' object is not subscriptable"):
        trainer.train()
    assert installed == [(True, True)]


def test_a_forward_of_ligers_is_refused_before_a_model_is_loaded(make_args, dataset, installed):
    args = make_args(use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": True})
    with pytest.raises(
        ValueError, match=r"liger_kernel_config: fused_linear_cross_entropy=True replaces .*Leave it out"
    ):
        OPSDTrainer("no/model", args=args, train_dataset=dataset)


def test_kernels_without_a_gpu_and_kernels_that_are_not_installed_are_refused(
    make_args, dataset, installed, monkeypatch
):
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: True)
    with pytest.raises(ValueError, match="use_liger_kernel=True without a GPU"):
        OPSDTrainer("no/model", args=make_args(use_liger_kernel=True), train_dataset=dataset)
    monkeypatch.setattr(kernels, "is_liger_kernel_available", lambda: False)
    with pytest.raises(ValueError, match="liger-kernel is not installed"):
        OPSDTrainer("no/model", args=make_args(use_liger_kernel=True), train_dataset=dataset)


def test_a_trl_whose_own_loss_is_ligers_is_refused_by_its_version(make_args, dataset, installed, monkeypatch):
    class Older:
        def __init__(self):
            self.use_liger_kernel = True

        def _compute_loss(self, model, inputs):
            return self.compute_liger_loss(model, inputs) if self.use_liger_kernel else None

    assert not versions.liger_enters_loss()
    monkeypatch.setattr(versions, "GRPOTrainer", Older)
    assert versions.liger_enters_loss()
    with pytest.raises(ValueError, match=r"before TRL 1\.16 it also replaces GRPO's loss"):
        OPSDTrainer("no/model", args=make_args(use_liger_kernel=True), train_dataset=dataset)
