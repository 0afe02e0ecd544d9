# SPDX-License-Identifier: Apache-2.0
"""What TRL's model card reads of a trainer class."""


class NamedByMethod:
    """Gives TRL's model card the name, paper and tags of a trainer's `method`."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        method = getattr(cls, "method", None)
        if method is not None:
            cls._name, cls._paper = method.name, method.paper
            cls._tag_names = ["trl-opsd", "self-distillation", method.name.lower().replace(" ", "-")]
