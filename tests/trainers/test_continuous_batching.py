# SPDX-License-Identifier: Apache-2.0
"""TRL's sampling by transformers' continuous batching, beside `generate`."""

import pytest
import torch

from trl_opsd import OPSDConfig

FIELD = "use_transformers_continuous_batching"
if FIELD not in OPSDConfig.__dataclass_fields__:
    pytest.skip("this TRL has none", allow_module_level=True)

# Its cache would be as large as the machine's memory.
SMALL = {
    FIELD: True,
    "transformers_continuous_batching_config": {"num_blocks": 64, "block_size": 32, "max_batch_tokens": 256},
}


def run(build, make_model, **settings):
    greedy = {"temperature": 1e-4, "loss_temperature": 1.0}
    trainer = build(given=False, model=make_model(torch.float32), max_steps=2, num_generations=2, **greedy, **settings)
    trainer.train()
    keys = ("loss", "divergence", "completions/mean_length", "grad_norm")
    return [[entry[key] for key in keys] for entry in trainer.state.log_history if "divergence" in entry]


def test_rollouts_and_losses_are_those_of_generate(build, make_model):
    wanted = run(build, make_model)
    assert len(wanted) == 2
    torch.testing.assert_close(run(build, make_model, **SMALL), wanted, rtol=1e-4, atol=1e-6)


def test_it_is_refused_where_it_would_narrow_what_trains(build, make_model):
    with pytest.raises(ValueError, match=rf"{FIELD}=True with bf16=True: .*set bf16=False"):
        build(model=make_model(torch.float32), bf16=True, **SMALL)
    build(model=make_model(torch.bfloat16), bf16=True, **SMALL)  # as the user wants it
