"""``motionrag encode``: shards -> a token store, every clip decoded and encoded once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from motionrag.data.shards import ClipRecord, ShardIndex
    from motionrag.data.video import Clip
    from motionrag.encoders import FrozenEncoder


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the token store, or what is missing of it; see ``conf/encode.yaml`` for the keys."""
    import torch
    from hydra.utils import instantiate

    from motionrag.data.shards import ShardIndex

    shards = ShardIndex.open(str(cfg.shards))
    encoders = instantiate(cfg.encoders, _convert_="all")
    device = cfg.device or ("cuda" if torch.cuda.is_available() else "cpu")
    for encoder in encoders.values():
        _ = encoder.weights  # the fingerprint, read before the weights move
        encoder.to(device)
    counts = encode(shards, Path(str(cfg.out)), encoders, int(cfg.batch_size), float(cfg.max_bad))
    return {
        "summary": (
            f"{counts['clips']} clips in {len(shards.shards)} part(s) -> {cfg.out}; {counts['kept']} part(s) were "
            f"there already, {len(counts['skipped'])} clip(s) skipped; next: motionrag index db={cfg.out}"
        ),
        "out": str(cfg.out),
        **counts,
    }


def encode(
    shards: ShardIndex, out: Path, encoders: Mapping[str, FrozenEncoder], batch_size: int, max_bad: float
) -> dict[str, Any]:
    """Encode the shards that ``out`` does not hold yet.

    encoders: motion, appearance and caption. max_bad: largest share (0..1) of all clips that may fail to
    decode. Returns counts: clips, kept (parts found), encoded (parts made), skipped. Raises
    :class:`MotionRAGError` if ``out`` holds something else, a shard is damaged, or too much is bad.
    """
    from rich.progress import Progress

    from motionrag.errors import MotionRAGError
    from motionrag.retrieval.bank import PARTS, PartWriter, read_about

    about = _about(shards, encoders)
    _open_store(out, about)
    skipped: list[dict[str, str]] = []
    clips = kept = 0
    with Progress() as progress:
        task = progress.add_task("encoding", total=len(shards))
        for shard in shards.shards:
            name = Path(shard["file"]).stem
            if (out / PARTS / name).is_dir():
                part = read_about(out / PARTS / name)
                expected = {"sha256": shard["sha256"], "encoders": about["encoders"]}
                if {key: part.get(key) for key in expected} != expected:
                    raise MotionRAGError(
                        f"{out / PARTS / name} was made from another shard or by other encoders than "
                        f"{shard['file']} and these; delete it or encode into a new folder"
                    )
                kept += 1
            else:
                path = shards.verify(shard)
                bad: list[dict[str, str]] = []
                origin = {
                    "shard": shard["file"],
                    "sha256": shard["sha256"],
                    "encoders": about["encoders"],
                    "preview_frames": about["sampling"]["preview_frames"],
                    "skipped": bad,
                }
                with PartWriter(out, name, origin) as writer:
                    decoded = _clips(path, encoders["motion"].frames, bad)
                    while batch := list(islice(decoded, batch_size)):
                        _add(writer, batch, encoders)
                        progress.advance(task, len(batch))
                        _stop_if_too_many(skipped + bad, len(shards), max_bad)
                    _stop_if_too_many(skipped + bad, len(shards), max_bad)
                part = read_about(out / PARTS / name)
            skipped += part["skipped"]
            clips += part["clips"]
            progress.update(task, completed=clips + len(skipped))
    return {"clips": clips, "kept": kept, "encoded": len(shards.shards) - kept, "skipped": skipped}


def _about(shards: ShardIndex, encoders: Mapping[str, FrozenEncoder]) -> dict[str, Any]:
    """What all parts of a store have in common."""
    return {
        "schema": "motionrag.store/1",
        "shards": [{key: shard[key] for key in ("file", "clips", "sha256")} for shard in shards.shards],
        "encoders": {role: dict(encoder.identity) for role, encoder in encoders.items()},
        "sampling": {
            "motion": f"{encoders['motion'].frames} frames, first to last of the clip's span, uniformly",
            "appearance": "first frame of the span",
            "caption": "motion_caption",
            "preview_frames": min(8, encoders["motion"].frames),
        },
    }


def _open_store(out: Path, about: dict[str, Any]) -> None:
    """Start a store, or make sure that the one at ``out`` is to be continued by these shards and encoders."""
    from motionrag.errors import MotionRAGError
    from motionrag.io import write_json
    from motionrag.retrieval.database import STORE, read_store

    if not (out / STORE).exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise MotionRAGError(f"out={out} is there and is no token store; choose another folder")
        write_json(out / STORE, about)
        return
    stored = read_store(out)
    for role, identity in about["encoders"].items():
        if stored["encoders"][role] != identity:
            raise MotionRAGError(
                f"out={out} was encoded with the {role} encoder {_short(stored['encoders'][role])}, this run uses "
                f"{_short(identity)}; use the same encoders or encode into a new folder"
            )
    if stored["shards"] != about["shards"]:
        raise MotionRAGError(
            f"out={out} was encoded from other shards ({len(stored['shards'])} of them, these are "
            f"{len(about['shards'])}); encode into a new folder"
        )


def _short(identity: Mapping[str, Any]) -> str:
    return f"{identity['name']} (width {identity['width']}, weights {identity['weights'][:8]})"


def _clips(path: Path, frames: int, bad: list[dict[str, str]]) -> Iterator[tuple[ClipRecord, Clip]]:
    """The decoded clips of a shard; those that cannot be decoded go to ``bad``."""
    from motionrag.data.shards import read_shard
    from motionrag.data.video import UnreadableVideo, read_clip

    for record, data in read_shard(path):
        try:
            yield record, read_clip(data, record.start_sec, record.end_sec, frames=frames)
        except UnreadableVideo as error:
            bad.append({"id": record.id, "video": record.video, "reason": error.reason})


def _add(
    writer: Any, batch: tuple[tuple[ClipRecord, Clip], ...], encoders: Mapping[str, FrozenEncoder]
) -> None:
    import torch

    motion, appearance, caption = (encoders[role] for role in ("motion", "appearance", "caption"))
    device = next(motion.parameters()).device
    clips, stills = [], []
    for _, clip in batch:
        # One clip at a time up to the networks' input: sizes differ. Bytes travel, floats are made there.
        video = torch.from_numpy(clip.frames).to(device).movedim(-1, 1).float() / 127.5 - 1
        clips.append(motion.pixels(video[None]))
        stills.append(appearance.pixels(video[:1]))
    writer.add(
        [asdict(record) for record, _ in batch],
        motion.features(torch.cat(clips)).cpu().numpy(),
        appearance.features(torch.cat(stills)).cpu().numpy(),
        caption.encode([record.motion_caption for record, _ in batch]).cpu().numpy(),
        [_preview(clip, min(8, motion.frames)) for _, clip in batch],
    )


def _preview(clip: Clip, count: int) -> Any:
    """``count`` of the clip's frames, at most 64 pixels on the short side: uint8 (count,h,w,3)."""
    import numpy as np
    from PIL import Image

    from motionrag.encoders import uniform_indices

    frames = clip.frames[uniform_indices(len(clip.frames), count)]
    height, width = frames.shape[1:3]
    if min(height, width) <= 64:
        return frames
    scale = 64 / min(height, width)
    size = (round(width * scale), round(height * scale))
    return np.stack(
        [np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames]
    )


def _stop_if_too_many(skipped: list[dict[str, str]], clips: int, max_bad: float) -> None:
    from motionrag.errors import MotionRAGError

    if len(skipped) > max_bad * clips:
        shown = ", ".join(f"{item['id']} ({item['reason']})" for item in skipped[:5])
        raise MotionRAGError(
            f"{len(skipped)} of {clips} clips cannot be decoded, more than max_bad={max_bad:g} allows: {shown}; "
            "pack the clips again or raise max_bad"
        )
