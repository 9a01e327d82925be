"""Location of a model: packaged, local, or on the hub, which is replaced here."""

import os
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import errors

from hetis.models.hub import PACKAGED, resolve_model


def test_no_name_is_the_packaged_model() -> None:
    assert resolve_model(None) == PACKAGED


def test_a_directory_is_itself(tmp_path: Path) -> None:
    assert resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("model", ["/no/such/directory", "./here", "a/b/c", "", "has space/x"])
def test_names_of_neither_a_directory_nor_a_hub_id_are_refused(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **kwargs: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match="neither an existing directory nor a hub id"):
        resolve_model(model)


def test_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="is a file"):
        resolve_model(str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize("local", [True, False])
def test_a_revision_of_a_local_model_is_refused(local: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^revision 'v9': .* has no revisions"):
        resolve_model(str(tmp_path) if local else None, "v9")


def test_errors_about_a_tokenizer_say_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"^tokenizer '/no/such' is neither"):
        resolve_model("/no/such", what="tokenizer")


@pytest.mark.parametrize("weights", [True, False])
def test_only_data_is_downloaded(weights: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **arguments: Any) -> str:
        asked.update(arguments, model=model)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("owner/name", "v2", weights) == tmp_path
    assert (asked["model"], asked["revision"]) == ("owner/name", "v2")
    assert ("*.safetensors" in asked["allow_patterns"]) == weights
    assert not {"*", "*.bin", "*.py"} & set(asked["allow_patterns"])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (errors.RepositoryNotFoundError, "correct the name"),
        (errors.RevisionNotFoundError, "correct the revision"),
        (errors.GatedRepoError, "HF_TOKEN"),
        (errors.LocalEntryNotFoundError, "check the network or give a directory"),
        (ConnectionError, "check the network or give a directory"),
    ],
)
def test_errors_of_the_hub_have_a_remedy(error: type[Exception], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> str:
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=words) as refused:
        resolve_model("owner/name", "v2")
    assert "'owner/name' at revision 'v2'" in str(refused.value)


def test_without_network_the_error_is_that_of_the_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub client raises LocalEntryNotFoundError from it, whose own text is about its cache."""

    def download(*_: Any, **__: Any) -> str:
        raise errors.LocalEntryNotFoundError("Got: nothing\nand no snapshot") from ConnectionError("no route\nto it")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ValueError, match=r" from the hub \(ConnectionError: no route\); check the network"):
        resolve_model("owner/name")


@pytest.mark.parametrize(
    ("model", "reason"),
    [("~nosuchuser/model", ""), ("/" + "x" * 300, " (File name too long)"), ("/a\0b", ""), ("/dev/null/x", "")],
)
def test_a_path_that_the_system_refuses_is_one_sentence(model: str, reason: str) -> None:
    with pytest.raises(ValueError) as refused:
        resolve_model(model)
    assert str(refused.value).endswith(f"nor a hub id such as Qwen/Qwen3-0.6B{reason}.")


def test_a_loop_of_links_is_named(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match=r"\(Too many levels of symbolic links\)"):
        resolve_model(str(tmp_path / "loop"))


def test_a_directory_that_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)  # file modes do not stop root
    with pytest.raises(ValueError, match=r"^model '.*' cannot be read \(Permission denied\)"):
        resolve_model(str(tmp_path))


def test_a_pipe_among_the_files_is_refused_and_a_broken_link_is_not(tmp_path: Path) -> None:
    """Reading a pipe would block."""
    (tmp_path / "tokenizer.json").symlink_to("nowhere")
    os.mkfifo(tmp_path / "notes")
    assert resolve_model(str(tmp_path)) == tmp_path
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(ValueError, match=r"config.json, a pipe, socket or device instead of a file"):
        resolve_model(str(tmp_path))
