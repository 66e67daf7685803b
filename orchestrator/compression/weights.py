"""A run's weights as safetensors: a file of plain tensors by name, which any framework reads and nothing unpickles."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from orchestrator.compression.trained import newest_checkpoint, read_weights
from orchestrator.config import parse_config
from orchestrator.errors import RunFolderError, explain_oserror
from orchestrator.storage.folder import find_run, read_json
from orchestrator.storage.store import is_s3

__all__ = ["WrittenWeights", "export_weights"]


@dataclass(frozen=True)
class WrittenWeights:
    """What a file holds, and of which checkpoint."""

    file: str
    checkpoint: str
    size_bytes: int
    num_tensors: int
    num_elements: int
    aliases: Mapping[str, str]
    """Names of tied weights that are left out, and under which name each is in the file."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return dataclasses.asdict(self)


def export_weights(run: str, file: Path | None = None, *, overwrite: bool = False) -> WrittenWeights:
    """Write parameters and buffers of ``run``'s newest checkpoint, of any ZeRO stage, in fp32; see ``read_weights``.

    The job's code is not needed. Tied weights are in the file once, and its metadata names the others, in the form of
    ``safetensors.torch.save_model``, so that ``load_model`` fills a model whose weights are tied.

    Raises:
        RequestError: there is no such run, it has no sound checkpoint, or the file is there or cannot be written.
    """
    folder = find_run(run)
    config = read_json(folder.config)
    if config is None:
        raise RunFolderError(f"{folder.root}: config.json is missing: it was never started")
    name: str = parse_config(config).name
    beside = Path("exported") / name if is_s3(run) else folder.root / "exported"
    path = file or beside / f"{name}.safetensors"
    if path.exists() and not overwrite:
        raise RunFolderError(f"{path} exists: give another file, or --overwrite")
    checkpoint = newest_checkpoint(folder)
    kept, aliases = _once(read_weights(checkpoint))
    _save(kept, aliases, path)
    elements = sum(tensor.numel() for tensor in kept.values())
    return WrittenWeights(str(path), checkpoint.name, path.stat().st_size, len(kept), elements, aliases)


def _once(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Each tensor under the first of its names, and the other names: the format knows no shared memory."""
    first: dict[int, str] = {}
    kept: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    for name, tensor in sorted(weights.items()):
        if (known := first.setdefault(id(tensor), name)) == name:
            kept[name] = tensor.contiguous()
        else:
            aliases[name] = known
    return kept, aliases


def _save(tensors: dict[str, Tensor], aliases: Mapping[str, str], path: Path) -> None:
    """A reader sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, {"format": "pt", **aliases})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"cannot write: {explain_oserror(path, error)}") from None
    except SafetensorError as error:  # what it makes of a full disk
        raise RunFolderError(f"cannot write {path}: {error}") from None
