"""Exports on the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError

from alphatoken.errors import UserError

# The last is of whatever client the library talks through: no connection, for example.
REFUSALS: tuple[type[Exception], ...] = (OSError, ValueError, HfHubHTTPError.__bases__[0])


def prepare_repository(name: str) -> str:
    """Makes a model repository, private, unless it is there; returns its full name. Raises
    UserError without a login, or where the hub refuses."""
    if get_token() is None:
        raise UserError(
            f"--push {name} needs a login to the Hugging Face Hub: run `hf auth login`, or set "
            "HF_TOKEN to a token that may write"
        )
    try:
        made = HfApi().create_repo(name, private=True, exist_ok=True)
    except REFUSALS as error:
        raise UserError(f"--push {name}: the hub refuses the repository: {error}") from None
    return made.repo_id


def push_folder(folder: Path, repository: str, message: str) -> str:
    """Uploads an export as one commit; returns its address. Raises UserError where that fails."""
    try:
        done = HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=message)
    except REFUSALS as error:
        raise UserError(
            f"--push {repository}: {error}; the export is in {folder}, and `hf upload {repository} "
            f"{folder}` uploads it"
        ) from None
    return str(done.commit_url)
