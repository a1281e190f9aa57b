"""Released checkpoints: the reference's `.ckpt` files -> our weights, and back, key for key.

A published folder holds, with tensors mostly in bf16:

| file | holds | ours |
|---|---|---|
| Motion-Adapter.ckpt | motion adapter and its motion Resampler, under `state_dict` | adapter.safetensors |
| motion_proj.ckpt | the same motion Resampler, a flat dict | adapter.safetensors |
| motion_transformer.ckpt | CAMA and its appearance Resampler, under `state_dict` | cama.safetensors |
| 17_frames.ckpt | CogVideoX only: q, k and v of every block, fine-tuned on 17 frames | backbone.safetensors |

Tensors keep their values and precision; only their names change. What the reference does not save (CAMA's start tokens,
in DynamiCrafter also the adapter's queries) is drawn from a fixed seed, and left out again on the way back.
"""

import re
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor, nn

from motionrag.checkpoint import check_state, described_network, read_pickled, read_weights, save_weights
from motionrag.errors import MotionRAGError
from motionrag.io import put_in_place, write_text
from motionrag.modules.cama import CAMA
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler

ADAPTER, RESAMPLER = "Motion-Adapter.ckpt", "motion_proj.ckpt"
CAMA_FILE, FINETUNE = "motion_transformer.ckpt", "17_frames.ckpt"
# Our file -> the files it is made of.
SOURCES = {"adapter": (ADAPTER, RESAMPLER), "cama": (CAMA_FILE,), "backbone": (FINETUNE,)}
# Parts of keys that a file may do without, all of them at once.
OPTIONAL = ("action_proj_model.", ".to_q_a.", "sos_token")
# What all of them were trained with; conf/encoders/full.yaml.
ENCODERS = {
    "motion": {"name": "MCG-NJU/videomae-base-finetuned-ssv2", "size": 224},
    "appearance": {"name": "facebook/dinov2-large", "size": 224},
}
PRECISIONS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
FLAT = {RESAMPLER}  # every other file keeps its tensors under `state_dict`


@dataclass(frozen=True)
class Release:
    """One published backbone.

    Attributes:
        name: of the release and of its backbone config.
        root: what the reference's adapter keys start with.
        projections: our projection -> the reference's key below a site.
        sites: adapter site, as our backbone names it -> hidden width.
        settings: what generate and evaluate take for it, beside sizes and weights.
    """

    name: str
    root: str
    projections: Mapping[str, str]
    sites: Mapping[str, int]
    settings: Mapping[str, Any] = field(default_factory=dict)


def _sites(pattern: str, blocks: Mapping[str, int]) -> dict[str, int]:
    return {pattern.format(block): width for block, width in blocks.items()}


_PROCESSOR = {f"to_{x}": f"processor.to_{x}_ip.0" for x in "qkv"}
_SVD_BLOCKS = {
    f"{block}.attentions.{i}": width
    for block, width, layers in (
        ("down_blocks.0", 320, 2), ("down_blocks.1", 640, 2), ("down_blocks.2", 1280, 2), ("mid_block", 1280, 1),
        ("up_blocks.1", 1280, 3), ("up_blocks.2", 640, 3), ("up_blocks.3", 320, 3),
    )
    for i in range(layers)
}  # fmt: skip
_DYNAMICRAFTER_BLOCKS = {
    **{f"input_blocks.{i}": 320 * 2 ** (i // 3) for i in (1, 2, 4, 5, 7, 8)},
    "middle_block": 1280,
    **{f"output_blocks.{i}": 1280 // 2 ** (i // 3 - 1) for i in range(3, 12)},
}
RELEASES = {
    release.name: release
    for release in (
        Release(
            "cogvideox",
            "transformer.",
            _PROCESSOR,
            _sites("transformer_blocks.{}.attn1", {str(i): 3072 for i in range(42)}),
            {"steps": 25, "guidance": 3.0},
        ),
        Release(
            "svd",
            "unet.",
            _PROCESSOR,
            _sites("{}.transformer_blocks.0.attn2", _SVD_BLOCKS),
            # the query that the published adapter was trained with
            {"steps": 25, "guidance": 3.0, "backbone": {"adapter_query": "output"}},
        ),
        Release(
            "dynamicrafter",
            "model.diffusion_model.",
            {f"to_{x}": f"to_{x}_a" for x in "qkv"},
            _sites("{}.1.transformer_blocks.0.attn2", _DYNAMICRAFTER_BLOCKS),
            {"steps": 30, "guidance": 2.0},
        ),
    )
}


def find_release(name: str) -> Release:
    """The release of that name; raises MotionRAGError with the names there are."""
    if name not in RELEASES:
        raise MotionRAGError(f"release={name}: expected one of {', '.join(RELEASES)}")
    return RELEASES[name]


# --- names -------------------------------------------------------------------------------------------------------


def key_map(release: Release, keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Published file -> {the reference's key: our key}, for our keys.

    Raises MotionRAGError for a key that no published file has a place for.
    """
    files: dict[str, dict[str, str]] = {ADAPTER: {}, RESAMPLER: {}, CAMA_FILE: {}, FINETUNE: {}}
    starts = {
        "resampler.": ((RESAMPLER, ""), (ADAPTER, "action_proj_model.")),
        "cama.appearance_resampler.": ((CAMA_FILE, "condition_proj."),),
        "cama.transformer.": ((CAMA_FILE, "transformer."),),
        "cama.sos": ((CAMA_FILE, "sos_token"),),
        "backbone.": ((FINETUNE, release.root),),
    }
    for key in keys:
        if key.startswith("motion_adapter."):
            site, projection, kind = key.removeprefix("motion_adapter.").rsplit(".", 2)
            site = site.replace("/", ".")
            files[ADAPTER][f"{release.root}{site}.{release.projections[projection]}.{kind}"] = key
            continue
        start = next((start for start in starts if key.startswith(start)), None)
        if start is None or (start == "backbone." and release.name != "cogvideox"):
            raise MotionRAGError(f"{key} has no place in the published files of {release.name}")
        for file, prefix in starts[start]:
            files[file][prefix + key.removeprefix(start)] = key
    return files


def expected_shapes(release: Release, sizes: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Our keys and shapes for a whole release.

    sizes holds the configs (`_target_` and sizes) of `resampler` and `cama`.
    """
    from hydra.utils import instantiate

    with torch.device("meta"):
        resampler, cama = (instantiate(sizes[part]) for part in ("resampler", "cama"))
    expected = _expected(release, resampler, cama, finetuned=release.name == "cogvideox")
    return {key: tuple(value.shape) for key, value in expected.items()}


def _expected(release: Release, resampler: Resampler, cama: CAMA, finetuned: bool) -> dict[str, Tensor]:
    """Our keys and, without values, their tensors; with those of the 17-frame fine-tune if there is one."""
    parts: dict[str, nn.Module] = {"resampler": resampler, "cama": cama}
    with torch.device("meta"):
        parts["motion_adapter"] = MotionAdapter(
            {site: (width, 1) for site, width in release.sites.items()}, resampler.output_dim
        )
        if finetuned:
            for site, width in release.sites.items():
                for projection in ("to_q", "to_k", "to_v"):
                    parts[f"backbone.{site}.{projection}"] = nn.Linear(width, width)
    return {f"{part}.{key}": value for part, m in parts.items() for key, value in m.state_dict().items()}


# --- import ------------------------------------------------------------------------------------------------------


def import_release(
    release: str,
    path: str | Path,
    out: str | Path,
    sizes: Mapping[str, Any],
    sites: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Published checkpoints in the folder `path` -> the new folder `out`: adapter.safetensors, cama.safetensors, for
    CogVideoX with 17_frames.ckpt also backbone.safetensors, each with its manifest, and `release/<name>.yaml` for
    `motionrag generate --config-dir OUT +release=<name>`.

    sizes as in `expected_shapes`; sites, {name: hidden width}, default to the published backbone's. All files are read
    and checked before anything is written.

    Returns {"release", "files": {file: {"tensors", "parameters", "dtype"}}, "missing": [file], "absent": {file: [key]},
    "filled": [our key]}: absent keys were not in the file, filled ones come from a fixed seed.

    Raises MotionRAGError when `out` is there already, a needed file is missing or unreadable or holds more than
    tensors, and when keys or shapes differ from what is expected.
    """
    chosen, folder, out = find_release(release), Path(path), Path(out)
    chosen = _with_sites(chosen, sites)
    shapes = expected_shapes(chosen, sizes)
    maps = key_map(chosen, shapes)
    _check_folder(folder, chosen)
    _check_new(out)
    states: dict[str, dict[str, Tensor]] = {name: {} for name in SOURCES}
    report: dict[str, Any] = {"release": chosen.name, "files": {}, "missing": [], "absent": {}, "filled": []}
    for name, sources in SOURCES.items():
        for source in sources:
            if not maps[source]:
                continue
            if not (folder / source).is_file():
                report["missing"].append(source)
                continue
            found = _read_checkpoint(folder / source)
            absent = _check_keys(folder / source, found, maps[source], shapes, chosen)
            state = {ours: found[theirs] for theirs, ours in maps[source].items() if theirs in found}
            _merge(states[name], state, folder / source)
            report["files"][source] = _counts(state)
            if absent:
                report["absent"][source] = absent
    if not any(key.startswith("resampler.") for key in states["adapter"]):
        raise MotionRAGError(
            f"{folder} holds no motion Resampler: expected {RESAMPLER}, or action_proj_model keys in {ADAPTER}"
        )
    for name in ("adapter", "cama"):
        report["filled"] += _fill(
            states[name], [k for k in shapes if k.split(".")[0] in _PARTS[name]], shapes
        )
    with _new_folder(out, sum(t.nbytes for state in states.values() for t in state.values())) as partial:
        for name, state in states.items():
            if state:
                save_weights(partial / f"{name}.safetensors", _own(state), _about(name, report, sizes))
        config = _config(chosen, out.resolve(), sizes, finetune=bool(states["backbone"]))
        write_text(partial / "release" / f"{chosen.name}.yaml", config)
    return report


_PARTS = {"adapter": ("resampler", "motion_adapter"), "cama": ("cama",)}


def _with_sites(release: Release, sites: Mapping[str, int] | None) -> Release:
    if sites is None:
        return release
    widths = list(sites.values()) if isinstance(sites, Mapping) else []
    if not widths or not all(isinstance(width, int) and width > 0 for width in widths):
        site, width = next(iter(release.sites.items()))
        raise MotionRAGError(
            f"sites={sites}: expected the width of each adapter site, such as {{{site}: {width}}}"
        )
    return replace(release, sites=dict(sites))


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint, mapped from the file; runs nothing that is in it."""
    tensors = read_pickled(path)
    for key, value in tensors.items():
        if not isinstance(value, Tensor) or value.dtype not in PRECISIONS:
            kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
            raise MotionRAGError(f"{path}: {key} is {kind}, expected a tensor of floats of 16, 32 or 64 bits")
        if value.is_meta or value.layout != torch.strided:
            kind = "without values" if value.is_meta else "sparse"
            raise MotionRAGError(f"{path}: {key} is {kind}, expected a plain tensor: save it as one")
        if not value.isfinite().all():
            raise MotionRAGError(
                f"{path}: {key} holds values that are no numbers: get a checkpoint from before that"
            )
    return {key: value.detach() for key, value in tensors.items()}


def _check_keys(
    path: Path,
    found: Mapping[str, Tensor],
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    release: Release,
) -> list[str]:
    """Optional keys that the file lacks; raises MotionRAGError naming the first key that differs."""
    for other in RELEASES.values():
        theirs = tuple(f"{other.root}{site}." for site in other.sites)
        foreign = next((key for key in found if key not in keys and key.startswith(theirs)), None)
        if other.name != release.name and foreign:
            raise MotionRAGError(
                f"{path} is a checkpoint of {other.name} ({foreign} is {list(found[foreign].shape)}), expected one of "
                f"{release.name}: give release={other.name} or {release.name}'s folder"
            )
    groups = [[key for key in keys if part in key] for part in OPTIONAL]
    absent = [key for group in groups if not any(key in found for key in group) for key in group]
    missing = [key for key in keys if key not in found and key not in absent]
    unexpected = [key for key in found if key not in keys]
    problem = None
    if missing:
        problem = f"{missing[0]} {list(shapes[keys[missing[0]]])} is missing"
    elif unexpected:
        problem = f"{unexpected[0]} {list(found[unexpected[0]].shape)} is unexpected"
    if problem:
        raise MotionRAGError(
            f"{path}: {problem} ({len(missing)} keys missing, {len(unexpected)} unexpected); expected the {len(keys)} "
            f"keys of {release.name}'s {path.name}"
        )
    for theirs, ours in keys.items():
        if theirs in found and tuple(found[theirs].shape) != shapes[ours]:
            raise MotionRAGError(
                f"{path}: {theirs} is {list(found[theirs].shape)}, expected {list(shapes[ours])} for {release.name}; "
                "for other sizes than the published ones set resampler, cama and sites"
            )
    return absent


def _merge(state: dict[str, Tensor], new: dict[str, Tensor], path: Path) -> None:
    """Add tensors; of two for one key, which must be equal as far as they go, the more precise one stays."""
    for key, tensor in new.items():
        if key not in state:
            state[key] = tensor
            continue
        rough, fine = sorted((state[key], tensor), key=lambda t: t.element_size())
        if not torch.equal(fine.to(rough.dtype), rough):
            raise MotionRAGError(
                f"{path} and {ADAPTER} hold different motion Resamplers ({key.removeprefix('resampler.')} differs): "
                "they are of two trainings; give files of one, or leave one of them out"
            )
        state[key] = fine


def _fill(state: dict[str, Tensor], keys: list[str], shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Draw what the files lack, always the same; returns the keys.

    Start tokens as CAMA's constructor does, queries as PyTorch's linear layers do: the distributions the reference
    draws them from at every start.
    """
    filled = [key for key in keys if key not in state]
    dtype = next(iter(state.values())).dtype
    for key in filled:
        generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))  # whatever else is filled
        scale = shapes[key][-1] ** -0.5
        values = torch.empty(shapes[key])
        if key == "cama.sos":
            values.normal_(0, scale, generator=generator)
        else:
            values.uniform_(-scale, scale, generator=generator)
        state[key] = values.to(dtype)
    return filled


def _own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors with a storage of their own, as safetensors wants them; whole ones are not copied."""
    seen: set[int] = set()
    own = {}
    for key, tensor in state.items():
        storage = tensor.untyped_storage()
        whole = (
            tensor.is_contiguous() and storage.nbytes() == tensor.nbytes and storage.data_ptr() not in seen
        )
        seen.add(storage.data_ptr())
        own[key] = tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
    return own


def _counts(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a report says about one published file."""
    return {
        "tensors": len(state),
        "parameters": sum(tensor.numel() for tensor in state.values()),
        "dtype": ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in state.values()})),
    }


def _about(name: str, report: Mapping[str, Any], sizes: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of one of our files says about where it comes from."""
    plain = OmegaConf.to_container(OmegaConf.create(dict(sizes)), resolve=True)
    parts = _PARTS.get(name, ())
    query = find_release(report["release"]).settings.get("backbone", {}).get("adapter_query", "output")
    return {
        "stage": name,
        "backbone": report["release"],
        **({"adapter_query": [query]} if name == "adapter" else {}),
        "encoders": ENCODERS if name != "backbone" else {},
        "sizes": {part: plain[part] for part in plain if part in parts},
        "release": {
            "name": report["release"],
            "files": {file: info for file, info in report["files"].items() if file in SOURCES[name]},
            "absent": {file: keys for file, keys in report["absent"].items() if file in SOURCES[name]},
            "filled": [key for key in report["filled"] if key.split(".")[0] in parts],
        },
    }


def _config(release: Release, out: Path, sizes: Mapping[str, Any], finetune: bool) -> str:
    """A config that makes generate and evaluate use the folder `out`."""
    config: dict[str, Any] = {
        "defaults": [{"override /backbone": release.name}, {"override /encoders": "full"}],
        "weights": {
            "folder": str(out),
            "adapter": "${weights.folder}/adapter.safetensors",
            "cama": "${weights.folder}/cama.safetensors",
        },
        **release.settings,
        **{part: sizes[part] for part in ("resampler", "cama")},
    }
    if finetune:
        config["backbone"] = {
            "_target_": "motionrag.release.load_cogvideox",
            "finetune": "${weights.folder}/backbone.safetensors",
        }
    return (
        "# @package _global_\n"
        f"# The published {release.name} weights, as motionrag import wrote them. Use from anywhere:\n"
        f'#   motionrag generate --config-dir {out} +release={release.name} image=FILE prompt="..." db=DB\n'
        "# evaluate takes the same two words. If the folder moves, correct weights.folder.\n"
        + OmegaConf.to_yaml(OmegaConf.create(config))
    )


# --- export ------------------------------------------------------------------------------------------------------


def export_release(release: str, path: str | Path, out: str | Path) -> dict[str, Any]:
    """adapter.safetensors, cama.safetensors (and backbone.safetensors if it is there) of the folder `path`, each with
    its manifest -> the reference's files in the new folder `out`.

    The adapter's sites may be those of another size of the release's backbone. What an import filled is left out again.
    Other weights keep their start tokens, which the reference reads as `sos_token`, and their queries.

    Returns {"release", "files": {file: {"tensors", "parameters", "dtype"}}}. Raises MotionRAGError, before anything is
    written, when `out` is there already, a weights file is missing, damaged or says no sizes, when keys or shapes are
    not those of its sizes, when the adapter's sites are not those of the release's backbone or not all, and when it was
    trained with another query than the reference's.
    """
    chosen, folder, out = find_release(release), Path(path), Path(out)
    _check_new(out)
    state: dict[str, Tensor] = {}
    absent: set[tuple[str, str]] = set()
    abouts: dict[str, Any] = {}
    for name in SOURCES:
        file = folder / f"{name}.safetensors"
        if name == "backbone" and not file.is_file():
            continue
        tensors, manifest = read_weights(file)
        state |= tensors
        about = manifest.get("about", {})
        if only := about.get("adapter_only"):
            raise MotionRAGError(
                f"{file} has adapters at the layers {only} alone, the reference at all: train Stage 1 with "
                "motion_adapter.only=null"
            )
        query = about.get("adapter_query", ["output"])
        if query != ["output"]:  # no key tells them apart
            raise MotionRAGError(
                f"{file} was trained with adapter_query={'/'.join(query)}, the reference only has output: train Stage 1 "
                "with backbone.adapter_query=output"
            )
        imported = about.get("release", {})
        absent |= {(source, key) for source, keys in imported.get("absent", {}).items() for key in keys}
        abouts[name] = about
    chosen = replace(chosen, sites=_found_sites(chosen, state, folder))
    with torch.device("meta"):
        resampler = described_network("resampler", folder / "adapter.safetensors", abouts["adapter"])
        cama = described_network("cama", folder / "cama.safetensors", abouts["cama"])
    expected = _expected(chosen, resampler, cama, finetuned=any(key.startswith("backbone.") for key in state))
    check_state(expected, state, f"{folder} for {chosen.name}", "copy, train or import them again")
    files = key_map(chosen, state)
    report: dict[str, Any] = {"release": chosen.name, "files": {}}
    with _new_folder(out, sum(tensor.nbytes for tensor in state.values())) as partial:
        for file, keys in files.items():
            theirs = {key: state[ours] for key, ours in keys.items() if (file, key) not in absent}
            if not theirs:
                continue
            torch.save(theirs if file in FLAT else {"state_dict": theirs}, partial / file)
            report["files"][file] = _counts(theirs)
    return report


def _found_sites(release: Release, state: Mapping[str, Tensor], folder: Path) -> dict[str, int]:
    """Adapter sites of our weights and their widths; of the published size all of them, whatever there is.

    Raises MotionRAGError for sites that another backbone has.
    """
    keys = [key for key in state if key.startswith("motion_adapter.")]
    if not keys:
        raise MotionRAGError(
            f"{folder}/adapter.safetensors holds no motion_adapter weights: give another folder"
        )
    kinds = {re.sub(r"\d+", "0", site) for site in release.sites}
    found: dict[str, int] = {}
    for key in keys:
        site = key.removeprefix("motion_adapter.").split(".")[0].replace("/", ".")
        if re.sub(r"\d+", "0", site) not in kinds:
            raise MotionRAGError(
                f"{key}: {release.name} has no adapter site {site}, its first is {next(iter(release.sites))}; "
                "choose the release of the backbone that these weights were trained on"
            )
        found.setdefault(site, state[key].shape[0] if state[key].ndim else 0)
    published = all(release.sites.get(site) == width for site, width in found.items())
    return dict(release.sites) if published else found


# --- the 17-frame fine-tune ----------------------------------------------------------------------------------------


def load_finetune(denoiser: nn.Module, path: str | Path) -> None:
    """Copy the tensors of backbone.safetensors into the denoiser's parameters of the same names.

    Raises MotionRAGError, before any is copied, when one has no counterpart or another shape.
    """
    state = {key.removeprefix("backbone."): value for key, value in read_weights(path)[0].items()}
    parameters = dict(denoiser.named_parameters())
    for key, value in state.items():
        found = list(parameters[key].shape) if key in parameters else "no such parameter"
        if found != list(value.shape):
            raise MotionRAGError(
                f"{path} does not fit this backbone: {key} is {list(value.shape)}, the backbone has {found}"
            )
    with torch.no_grad():
        for key, value in state.items():
            parameters[key].copy_(value)


def load_cogvideox(finetune: str, **options: Any):
    """`CogVideoX.load(**options)` with the 17-frame fine-tune of a release; a `_target_` for backbone configs."""
    from motionrag.backbones.cogvideox import CogVideoX

    backbone = CogVideoX.load(**options)
    load_finetune(backbone.denoiser, finetune)
    return backbone


# --- folders -------------------------------------------------------------------------------------------------------


def _check_folder(folder: Path, release: Release) -> None:
    needed = (ADAPTER, CAMA_FILE)
    missing = [file for file in needed if not (folder / file).is_file()]
    if not missing:
        return
    inside = sorted(path.parent for path in folder.glob(f"**/{ADAPTER}"))[:3] if folder.is_dir() else []
    hint = f"; there is {', '.join(map(str, inside))}" if inside else ""
    raise MotionRAGError(
        f"path={folder} has no {missing[0]}: give the folder with {release.name}'s {', '.join(needed)}{hint}"
    )


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise MotionRAGError(f"out={out} is there already: choose another folder, or remove it")


@contextmanager
def _new_folder(out: Path, size: int) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when the block ends well, and vanishes otherwise.

    Raises MotionRAGError when there is no room for `size` bytes.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < size:
        raise MotionRAGError(f"out={out} needs {size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")
    partial = out.with_name(f".{out.name}.{token_hex(4)}")
    partial.mkdir()
    try:
        yield partial
        put_in_place(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
