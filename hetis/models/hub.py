"""Location of a model: the one in the package, a local directory, or a snapshot from the Hugging Face hub."""

import errno
import os
import re
from pathlib import Path

PACKAGED = Path(__file__).parent.parent / "assets" / "tiny"

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_CONFIG_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]  # config, generation config, tokenizer, chat template, index
_WEIGHT_FILES = ["*.safetensors"]
_IGNORED_FILES = ["*/*", "consolidated*"]  # the same model in other formats


def resolve_model(model: str | None, revision: str | None = None, weights: bool = True, what: str = "model") -> Path:
    """Directory with config.json (and tokenizer, and, if `weights`, safetensors) of `model`.

    `model`: None for the small model in the package, an existing directory, or a hub id, which is downloaded or taken
    from the hub cache; pickles and code are never fetched. `what` is named in errors: "model" or "tokenizer". Raises
    ValueError if there is no such model, it cannot be reached, or a revision is given for one that has none.
    """
    if model is None:
        _refuse_revision(revision, "the model in the package")
        return PACKAGED
    directory = expanded(model)
    if model and os.path.isdir(directory):
        _refuse_revision(revision, f"{what} {model!r}, a local directory,")
        _check_directory(directory, f"{what} {model!r}")
        return directory
    if os.path.isfile(directory):
        raise ValueError(f"{what} {model!r} is a file; give the directory of a Hugging Face checkpoint.")
    if not _HUB_ID.fullmatch(model) or model.startswith("."):
        raise ValueError(
            f"{what} {model!r} is neither an existing directory nor a hub id such as Qwen/Qwen3-0.6B"
            f"{_stat_error(directory)}."
        )
    return _download(model, revision, weights, what)


def expanded(name: str) -> Path:
    """Path of `name`, with "~" expanded to the home directory if there is one."""
    return Path(os.path.expanduser(name))


def _stat_error(path: Path) -> str:
    """Reason, in parentheses, why the system refuses to look up `path`; empty if nothing exists there."""
    try:
        os.stat(path)
    except OSError as error:
        return "" if error.errno in (errno.ENOENT, errno.ENOTDIR) else f" ({error.strerror})"
    except ValueError:  # a null character
        return ""
    return ""


def _check_directory(directory: Path, name: str) -> None:
    """Raises ValueError if the directory cannot be listed, or holds a pipe or device, whose reader would block."""
    try:
        for entry in directory.iterdir():
            if not any(entry.match(pattern) for pattern in _CONFIG_FILES + _WEIGHT_FILES) or not entry.exists():
                continue  # not read, or a broken link
            if not entry.is_file() and not entry.is_dir():
                raise ValueError(f"{name} holds {entry.name}, a pipe, socket or device instead of a file; remove it.")
    except OSError as error:
        raise ValueError(f"{name} cannot be read ({error.strerror}); check its permissions.") from error


def _refuse_revision(revision: str | None, where: str) -> None:
    if revision is not None:
        raise ValueError(f"revision {revision!r}: {where} has no revisions; leave it out, or name a model on the hub.")


def _download(model: str, revision: str | None, weights: bool, what: str) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    where = f"{what} {model!r}" + (f" at revision {revision!r}" if revision else "")
    try:
        return Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=_CONFIG_FILES + (_WEIGHT_FILES if weights else []),
                ignore_patterns=_IGNORED_FILES,
            )
        )
    except hub.GatedRepoError as error:
        raise ValueError(f"{where} is gated; accept its terms on the hub and set HF_TOKEN.") from error
    except hub.RepositoryNotFoundError as error:
        raise ValueError(f"{where} is neither a directory nor a repository on the hub; correct the name.") from error
    except hub.RevisionNotFoundError as error:
        raise ValueError(f"{where} does not exist on the hub; correct the revision.") from error
    except Exception as error:  # no network, proxies, disk: the hub client raises errors of several libraries
        raise ValueError(
            f"{where} is not a directory and cannot be fetched from the hub ({_first_line(error)}); check the network "
            f"or give a directory."
        ) from error


def _first_line(error: Exception) -> str:
    """Kind of an error and the first line of its text. Of a LocalEntryNotFoundError ("not in the cache either") the
    error that led to it."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
    return ": ".join([type(cause).__name__, *str(cause).splitlines()[:1]])
