# SPDX-License-Identifier: Apache-2.0
"""SDFT: the teacher reads the row's answer as an example, and the student learns from its own rollout (arXiv 2601.19897).

    mean over tokens behind the third of min(q_old(y) / q_engine(y), 2) KL(p || q)

over the whole vocabulary and without a clip: OPSD under another prompt. The weights of the teacher are a moving average, 0.01
a step.

The paper prints KL(q || p); its authors say that every result was run with KL(p || q), as here. The moving average is what
readers found in the authors' code, while TRL's documentation has the weights frozen (`teacher_model_kind="base"`). Here the
average of a LoRA pair is that of its update; the authors' code fails with adapters.
"""

from .base import Method
from .opsd import privileged_contexts
from .papers import arxiv_paper
from .peers import engine_weight

SDFT = Method(
    name="SDFT",
    contexts=privileged_contexts,
    contexts_from_rows=True,
    token_weight=engine_weight,
    own_prompts=True,
    solution_shares=True,
    paper=arxiv_paper(
        "Self-Distillation Enables Continual Learning",
        "2601.19897",
        "shenfeld2026sdft",
        'Idan Shenfeld and Mehul Damani and Jonas H{\\"u}botter and Pulkit Agrawal',
    ),
)
