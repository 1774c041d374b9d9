"""Where a model's files are: shipped with the package, in a folder, or on the Hugging Face hub. Never pickle."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from tunefork.errors import MissingFileError, UnsupportedError, did_you_mean

EMBEDDED = "embedded"

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "README.md")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True, slots=True)
class Source:
    """A model's folder on this machine. From the hub it may lack weights until `with_weights`."""

    folder: Path
    hub_name: str | None = None
    commit: str | None = None


def find_source(name: str, revision: str | None) -> Source:
    """The folder of `embedded`, of a local model, or of a hub model (its small files are fetched, no weights).

    Raises MissingFileError when there is no such model or the hub cannot be reached, UnsupportedError when its
    weights are not safetensors.
    """
    if name == EMBEDDED:
        return Source(Path(str(files("tunefork") / "assets" / "fork-tiny")))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise MissingFileError(
                f"`model.revision` must be a version of a hub model. Received {revision!r} with the folder {name!r}. "
                "Try leaving it out."
            )
        _check_folder(folder)
        return Source(folder.resolve())
    if folder.exists():
        raise MissingFileError(
            f"`model.name` must be a folder or hub name. Received the file {name!r}. Try its folder."
        )
    if folder.parent != Path() and (folder.parent.is_dir() or folder.parts[0] == "runs"):  # what is meant is a path
        raise MissingFileError(
            f"A model or run must be a folder that is there, or a hub name. Received {name!r}: the folder "
            f"`{folder.parent}` has none of that name.{_near(folder) or ' Try another name.'}"
        )
    if not _HUB_NAME.fullmatch(name):
        raise MissingFileError(
            f"`model.name` must be a folder that is there, or a hub name. Received {name!r}, which is neither."
            f"{_near(folder)} Try `embedded`, the model that comes with Tunefork."
        )
    return _from_hub(name, revision)


def with_weights(source: Source) -> Path:
    """The folder with weights in it; those of a hub model are downloaded now, if they are not in its cache.

    Raises MissingFileError when they cannot be had.
    """
    if source.hub_name is None:
        return source.folder
    try:
        return Path(_snapshot(source.hub_name, source.commit, (*_TEXT_FILES, "*.safetensors")))
    except (OSError, ValueError) as error:
        raise _unreachable(source.hub_name, source.folder, error) from None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises MissingFileError or UnsupportedError naming the file."""
    if not path.is_file():
        raise MissingFileError(f"A model folder must hold {path.name}. Received {str(path.parent)!r} without it.")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UnsupportedError(
            f"{str(path)!r} must be JSON. Received something else ({error}). Try the original file again."
        ) from None
    if not isinstance(value, dict):
        raise UnsupportedError(f"{str(path)!r} must hold a JSON object. Received {type(value).__name__}.")
    return value


def safetensors_header(path: Path) -> dict[str, Any]:
    """name -> {dtype, shape, data_offsets}. Raises UnsupportedError when the file is damaged or cut short."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _damaged(path, f"{size} bytes cannot hold its header")
        try:
            header = json.loads(file.read(length))
            tensors = {k: v for k, v in header.items() if k != "__metadata__"}
            end = max((v["data_offsets"][1] for v in tensors.values()), default=0)
        except (ValueError, AttributeError, KeyError, TypeError, IndexError):
            raise _damaged(path, "its header is not safetensors JSON") from None
    if 8 + length + end != size:
        raise _damaged(path, f"{size} bytes, its header promises {8 + length + end}")
    return tensors


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, in order of name."""
    return sorted(folder.glob("*.safetensors"))


def fingerprint(source: Source) -> str:
    """sha256 that changes with the config and the weights: a hub model's commit, or of a folder each file's name,
    size, header and 64 blocks of 4 KiB spread over its tensors (weights of any size take milliseconds)."""
    digest = hashlib.sha256((source.folder / "config.json").read_bytes())
    if source.commit is not None:
        digest.update(source.commit.encode())
        return digest.hexdigest()
    for path in weight_files(source.folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}:".encode())
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            digest.update(file.read(length))
            for k in range(_SAMPLES):
                file.seek(8 + length + (size - 8 - length) * k // _SAMPLES)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        adapter = (folder / "adapter_config.json").is_file()
        what = "which holds an adapter, not a model" if adapter else "without one"
        advice = "Try the model it was trained on" if adapter else "Try the folder that `save_pretrained` wrote"
        raise MissingFileError(f"A model folder must hold config.json. Received {str(folder)!r}, {what}. {advice}.")
    if not weight_files(folder):
        raise _no_safetensors(str(folder), [p.name for p in folder.iterdir()])
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        missing = sorted({str(f) for f in read_json(index)["weight_map"].values() if not (folder / str(f)).is_file()})
        if missing:
            raise MissingFileError(
                f"A model folder must hold every part its index names. Received {str(folder)!r} without "
                f"{', '.join(missing[:3])}. Try downloading it again."
            )


def _from_hub(name: str, revision: str | None) -> Source:
    try:
        folder = Path(_snapshot(name, revision, _TEXT_FILES))
    except (OSError, ValueError) as error:
        raise _unreachable(name, Path(name), error) from None
    try:
        listed = huggingface_hub.HfApi().list_repo_files(name, revision=folder.name)
        if not any(f.endswith(".safetensors") and "/" not in f for f in listed):
            raise _no_safetensors(name, listed)
    except OSError:  # offline: what is in the cache is what there is
        pass
    if not (folder / "config.json").is_file():
        raise MissingFileError(f"A model must have config.json. Received {name!r} from the hub without one.")
    return Source(folder, name, folder.name)


def _snapshot(name: str, revision: str | None, patterns: Sequence[str]) -> str:
    return huggingface_hub.snapshot_download(
        name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
    )


def _near(folder: Path) -> str:
    """A hint where a folder beside the one named has nearly its name."""
    parent = folder.parent
    names = [p.name for p in parent.iterdir() if p.is_dir()] if parent.is_dir() else []
    hint = did_you_mean(folder.name, names)
    return hint.replace("`", f"`{parent}/", 1) if hint and str(parent) != "." else hint


def _unreachable(name: str, folder: Path, error: BaseException) -> MissingFileError:
    if isinstance(error, LocalEntryNotFoundError):
        why = "it is not in the cache, and the hub is not asked (offline) or does not answer"
    elif isinstance(error, RepositoryNotFoundError):
        why = "it has no such model, or shows it only to those who have logged in"
    else:
        why = textwrap.shorten(str(error), 160, placeholder=" …") or type(error).__name__
    return MissingFileError(
        f"`model.name` must be a folder that is there, or a hub name that can be reached. Received {name!r}: no such "
        f"folder, and from the hub: {why}.{_near(folder)} Try a folder, or fetch it first with `hf download {name}`."
    )


def _no_safetensors(name: str, listed: Sequence[str]) -> UnsupportedError | MissingFileError:
    pickles = [f for f in listed if f.endswith(_PICKLES) and f != "training_args.bin"]
    if pickles:
        return UnsupportedError(
            f"Weights must be safetensors: other formats can run code or are not read here. Received {name!r} with "
            f"{pickles[0]}. Try a revision with safetensors, or convert it where you trust it "
            "(`model.save_pretrained(folder)` of transformers 5)."
        )
    return MissingFileError(
        f"A model must have weights (*.safetensors). Received {name!r} with none. Try downloading it again."
    )


def _damaged(path: Path, what: str) -> UnsupportedError:
    return UnsupportedError(
        f"Weights must be whole safetensors files. Received {str(path)!r}: {what}. Try downloading it again."
    )
