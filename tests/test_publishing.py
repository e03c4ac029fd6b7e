"""Exports go to the hub, in whose place something stands here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from alphatoken.checkpoints import publishing
from alphatoken.cli import app
from alphatoken.errors import UserError


class Hub:
    """What was asked of the hub, and what it answers."""

    def __init__(self, *, refuses: str = "") -> None:
        self.asked: list[tuple[str, Any]] = []
        self._refuses = refuses

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        assert private
        assert exist_ok
        self._answer("create", name)
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        files = {file.name for file in folder_path.iterdir()}
        self._answer("upload", (repo_id, files, commit_message))
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")

    def _answer(self, what: str, asked: Any) -> None:
        self.asked.append((what, asked))
        if what == self._refuses:
            raise HfHubHTTPError.__bases__[0]("no route to the hub")


@pytest.fixture
def adapters(tiny_model: Path, tmp_path: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["v_proj"])).save_pretrained(
        str(tmp_path / "adapters")
    )
    return tmp_path / "adapters"


def export(source: Path, target: Path) -> Any:
    return CliRunner().invoke(
        app, ["export", str(source), str(target), "--merge", "--push", "mine"]
    )


def test_an_export_is_pushed(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr(publishing, "HfApi", lambda: hub)
    monkeypatch.setattr(publishing, "get_token", lambda: "token")
    done = export(adapters, tmp_path / "merged")
    assert done.exit_code == 0, done.output
    assert "https://hub/me/mine/commit/1" in done.output
    (_, name), (_, (repository, files, message)) = hub.asked
    assert (name, repository, message) == ("mine", "me/mine", "Export of adapters")
    assert files == {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files


def test_without_a_login_nothing_is_written(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(publishing, "get_token", lambda: None)
    done = export(adapters, tmp_path / "merged")
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith("--push mine needs a login to the Hugging Face Hub: run")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("refuses", "message"),
    [
        ("create", "--push mine: the hub refuses the repository: no route to the hub"),
        ("upload", "--push me/mine: no route to the hub; the export is in "),
    ],
)
def test_what_the_hub_refuses_is_said(
    refuses: str, message: str, adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is written where the repository is refused; an upload can be done later."""
    monkeypatch.setattr(publishing, "HfApi", lambda: Hub(refuses=refuses))
    monkeypatch.setattr(publishing, "get_token", lambda: "token")
    done = export(adapters, tmp_path / "merged")
    assert isinstance(done.exception, UserError)
    assert str(done.exception).startswith(message)
    assert (tmp_path / "merged").exists() == (refuses == "upload")
