"""What the folder or hub name of a model says before its weights are read."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PretrainedConfig
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, find_adapter_config_file

from alphatoken.errors import UserError


def read_settings(name: str, key: str = "model.name_or_path") -> PretrainedConfig:
    """A model's `config.json`. Raises UserError, naming the `key` that it is the value of, where
    there is none, and for the folder or hub name of LoRA adapters."""
    try:
        if (Path(name) / ADAPTER_CONFIG_NAME).is_file():
            raise OSError
        found: PretrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        if holds_adapters(name):
            raise UserError(
                f"{key}={name} holds LoRA adapters, not a whole model: merge them into the model "
                f"that they are of with `alphatoken export --merge {name} NEW_FOLDER`, and set "
                f"{key} to the new folder"
            ) from None
        of_a_hub = name.count("/") <= 1 and not name.startswith(("/", "."))
        reasons = [str(error)] if of_a_hub or Path(name).exists() else []
        if not Path(name).exists():
            reasons.insert(0, f"there is no folder {Path(name).absolute()}")
        raise UserError(f"{key}={name} cannot be loaded: {'; '.join(reasons)}") from None
    return found


def embeddings_of(name: str, key: str = "model.name_or_path") -> int:
    """How many tokens a model has embeddings for. Raises UserError as `read_settings` does."""
    number: int = read_settings(name, key).get_text_config().vocab_size
    return number


def holds_adapters(name: str) -> bool:
    """Whether a folder or hub name is of adapters, as peft writes them."""
    if Path(name).is_dir():
        return Path(name, str(ADAPTER_CONFIG_NAME)).is_file()
    try:
        found: str | None = find_adapter_config_file(name)
    except (OSError, ValueError):
        return False
    return found is not None
