# SPDX-License-Identifier: Apache-2.0
"""The embedded default: a tiny reasoning model, its task and the prompts of its teacher.

The model was made by `python -m trl_opsd.demo.build` and is shipped as package data.
"""

from importlib.resources import files

from .task import build_dataset, build_rows

__all__ = ["REFERENCE_ONLY_TEMPLATE", "TEACHER_PROMPT_TEMPLATE", "build_dataset", "build_rows", "model_path"]

# Short and made of characters the model knows; the second is the first without the problem.
TEACHER_PROMPT_TEMPLATE = "{prompt}\n[reference]\n{solution}\n[end]"
REFERENCE_ONLY_TEMPLATE = "[reference]\n{solution}\n[end]"


def model_path() -> str:
    """Folder of the shipped model, to be given to `from_pretrained`."""
    return str(files(__name__) / "model")
