"""Trained weights on disk: only what was trained, keys checked strictly, a manifest beside them.

`NAME.safetensors` holds tensors under the prefixes `resampler.`, `motion_adapter.` (Stage 1) and `cama.` (Stage 2);
`NAME.json` says what they are. The prefixes are the same in every file, so nothing ever renames a key.
"""

import errno
import io
import logging
import os
import pickletools
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from motionrag.errors import MotionRAGError
from motionrag.io import atomic_path, read_json, sha256, write_json
from motionrag.modules.cama import CAMA
from motionrag.modules.resampler import Resampler

SCHEMA = "motionrag.weights/1"
log = logging.getLogger(__name__)
PREFIXES = ("resampler", "motion_adapter", "cama")


def trainable_state(state: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A module's tensors, or those of its state dict, on the CPU; raises ValueError for keys outside the prefixes."""
    state = state.state_dict() if isinstance(state, nn.Module) else state
    state = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    foreign = [key for key in state if key.split(".")[0] not in PREFIXES]
    if foreign:
        raise ValueError(f"weights outside {PREFIXES} must not be saved: {foreign[:3]}")
    return state


def resolve(path: str | Path) -> Path:
    """`pkg:tiny/adapter.safetensors` -> that file in the installed package; other paths as they are."""
    text = str(path)
    return Path(str(files("motionrag") / "weights" / text[4:])) if text.startswith("pkg:") else Path(text)


def save_weights(
    path: str | Path, state: Mapping[str, Tensor], about: Mapping[str, Any] | None = None
) -> Path:
    """Write `path` (.safetensors) and its manifest (.json), each in one step.

    `about` (JSON-able) goes into the manifest beside sizes and checksum.
    """
    path = Path(path)
    with atomic_path(path) as temporary:
        try:
            save_file(dict(state), temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            if "No space left" in str(error):  # all that safetensors tells
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path)) from error
            raise
    manifest = {
        "schema": SCHEMA,
        "file": path.name,
        "sha256": sha256(path),
        "parameters": {
            prefix: sum(v.numel() for k, v in state.items() if k.startswith(f"{prefix}."))
            for prefix in sorted({key.split(".")[0] for key in state})
        },
        "about": dict(about or {}),
    }
    write_json(path.with_suffix(".json"), manifest)
    return path


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """State dict and manifest of a weights file, or of a checkpoint of `motionrag train` (`pkg:` names allowed).

    Raises MotionRAGError when the file is missing, unreadable or not the one its manifest describes.
    """
    path = resolve(path)
    if not path.is_file():
        raise MotionRAGError(f"no weights file {path}: give the .safetensors that motionrag train wrote")
    if path.suffix == ".ckpt":
        held = read_checkpoint(path)
        about = {**held["about"], "steps": held["global_step"]}
        return held["state_dict"], {
            "schema": SCHEMA,
            "file": path.name,
            "sha256": sha256(path),
            "about": about,
        }
    try:
        with safe_open(path, "pt") as file:
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise MotionRAGError(
            f"{path} is not a readable safetensors file ({error}): copy or train it again"
        ) from error
    beside = path.with_suffix(".json")
    try:
        manifest = read_json(beside) if beside.is_file() else {}
    except ValueError as error:
        raise MotionRAGError(f"{beside} is not readable JSON ({error}): copy it again") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("about", {}), dict):
        raise MotionRAGError(f"{beside} is not a manifest of weights: copy it again")
    if manifest and manifest.get("sha256") != sha256(path):
        raise MotionRAGError(f"{path} is not the file that {beside.name} describes: copy both again")
    return state, manifest


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a run of `motionrag train` saved to go on from, mapped from the file.

    Raises MotionRAGError for a damaged file and for any other one.
    """
    held = _unpickled(path)
    if not isinstance(held, dict) or not {"state_dict", "optimizer_states", "loops", "about"} <= held.keys():
        raise MotionRAGError(
            f"{path} is no checkpoint of motionrag train: expected a .ckpt of a run's checkpoints folder. Weights alone "
            "are the .safetensors of its weights folder or, of a published checkpoint, what motionrag import makes of it"
        )
    return held


def read_pickled(path: Path) -> dict[str, Any]:
    """What a `.ckpt` file of Lightning, DeepSpeed or plain PyTorch holds by name, mapped from the file.

    Nothing that is in it is run. Raises MotionRAGError when there is anything but tensors and plain containers in it,
    when it is damaged, and when it holds nothing by name.
    """
    content = _unpickled(path)
    held = content if isinstance(content, dict) else {}
    held = held.get("state_dict", held.get("module", held))  # of Lightning, of DeepSpeed
    if not isinstance(held, dict) or not held or not all(isinstance(key, str) for key in held):
        raise MotionRAGError(
            f"{path} holds no tensors by name, neither at the top nor under state_dict or module"
        )
    return {key.removeprefix("_forward_module."): value for key, value in held.items()}


def _unpickled(path: Path) -> Any:
    try:
        with warnings.catch_warnings(action="ignore"):  # what it warns of is said below, in words of ours
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        named = _named_in(path)
        foreign = next(
            (name for name in named or () if not name.startswith(("torch.", "collections."))), None
        )
        if foreign:
            reason = (
                f"holds {foreign}: expected tensors only; nothing was loaded, since such a file may run code. Save its "
                "state_dict alone, or get the published file again"
            )
        elif named is not None and not _default_format(path):
            reason = (
                "is pickled in another way than torch.save's default (a zip file, protocol 2), which alone is read "
                "without running what is in it: save it again by torch.save"
            )
        else:
            reason = "is not a whole checkpoint (damaged or cut off, or another kind of file): get it again, or start without it"
        raise MotionRAGError(f"{path} {reason}") from error


def _pickle_of(path: Path) -> bytes:
    """The pickle in a file of torch.save's, of its format until 1.6 with what stands around it."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return file.read(1 << 26)  # tensors come behind the pickles
    with zipfile.ZipFile(path) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def _named_in(path: Path) -> list[str] | None:
    """What a pickle would call, by name, without calling it; None if the file holds no whole pickle."""
    named: list[str] = []
    texts: list[str] = []
    try:
        stream = io.BytesIO(_pickle_of(path))
        for part in range(5):  # torch.save's format until 1.6: three, the tensors' names and a list of keys
            try:
                for operation, argument, _ in pickletools.genops(stream):
                    if operation.name == "GLOBAL":
                        named.append(str(argument).replace(" ", "."))
                    elif operation.name == "STACK_GLOBAL":
                        named.append(".".join(texts[-2:]))
                    elif isinstance(argument, str):
                        texts.append(argument)
            except Exception:
                if not part:
                    raise
                break
    except Exception:  # of a damaged file
        return None
    return named


def _default_format(path: Path) -> bool:
    return zipfile.is_zipfile(path) and _pickle_of(path)[:2] == b"\x80\x02"


def described_network(part: Literal["resampler", "cama"], file: Path, about: Mapping[str, Any]) -> Any:
    """The Resampler or CAMA, not filled, whose sizes the manifest of the weights file `file` tells under `about`.

    Only sizes are taken from it: a manifest, which may come from a hub, never chooses what is called. Raises
    MotionRAGError if it tells none, or some that no network has.
    """
    sizes = about.get("sizes")
    found = sizes.get(part) if isinstance(sizes, dict) else None
    if not isinstance(found, dict):
        raise MotionRAGError(
            f"{file.with_suffix('.json')} does not say the sizes of {part}: copy it from where the weights were written "
            "(motionrag train), or import the release again"
        )
    options = {key: value for key, value in found.items() if key != "_target_"}
    try:
        if part == "resampler":
            return Resampler(**options)
        appearance = {k: v for k, v in options.pop("appearance_resampler").items() if k != "_target_"}
        return CAMA(Resampler(**appearance), **options)
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, MotionRAGError) as error:
        raise MotionRAGError(
            f"{file.with_suffix('.json')}: no {part} has the sizes that it says ({error}): copy it again"
        ) from error


def check_state(
    expected: Mapping[str, Tensor],
    found: Mapping[str, Tensor],
    where: str,
    advice: str = "choose the configuration it was trained with",
) -> None:
    """Raise MotionRAGError naming the differing keys with their shapes unless both have the same of each.

    The message names three of each kind, the log all.
    """
    missing = [f"{k} {tuple(v.shape)}" for k, v in expected.items() if k not in found]
    extra = [f"{k} {tuple(v.shape)}" for k, v in found.items() if k not in expected]
    shapes = [
        f"{k} {tuple(found[k].shape)} instead of {tuple(v.shape)}"
        for k, v in expected.items()
        if k in found and found[k].shape != v.shape
    ]
    differing = {"of another size": shapes, "missing": missing, "unexpected": extra}
    parts = [
        f"{len(items)} {what}: {', '.join(items[:3])}{', ...' if len(items) > 3 else ''}"
        for what, items in differing.items()
        if items
    ]
    if parts:
        for what, items in differing.items():
            if len(items) > 3:
                log.info("%s, %d %s: %s", where, len(items), what, ", ".join(items))
        raise MotionRAGError(f"{where} does not fit this configuration ({'; '.join(parts)}): {advice}")


def load_weights(path: str | Path, **modules: nn.Module) -> dict[str, Any]:
    """Fill modules from a weights file: `load_weights(path, resampler=r, motion_adapter=a)`; returns the manifest.

    Every key below an asked prefix must fit; other prefixes in the file are left alone. All modules are checked
    before the first one is filled, so nothing is ever half loaded.
    """
    state, manifest = read_weights(path)
    parts = {prefix: _below(state, prefix) for prefix in modules}
    for prefix, module in modules.items():
        if not parts[prefix]:
            held = sorted({key.split(".")[0] for key in state})
            raise MotionRAGError(
                f"{path} holds no {prefix} weights, only {', '.join(held)}: give another weights file"
            )
        expected = {f"{prefix}.{k}": v for k, v in module.state_dict().items()}
        check_state(expected, {f"{prefix}.{k}": v for k, v in parts[prefix].items()}, str(path))
    for prefix, module in modules.items():
        module.load_state_dict(parts[prefix])
    return manifest


def count_parameters(parameters: Iterable[torch.nn.Parameter]) -> int:
    """Number of values."""
    return sum(p.numel() for p in parameters)


def _below(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{prefix}."): v for k, v in state.items() if k.startswith(f"{prefix}.")}
