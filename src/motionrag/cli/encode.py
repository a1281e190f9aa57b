"""``motionrag encode``: shards -> a token store, every clip decoded and encoded once."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

if TYPE_CHECKING:
    from motionrag.data.shards import ClipRecord, ShardIndex
    from motionrag.data.video import Clip
    from motionrag.encoders import FrozenEncoder
    from motionrag.modules.resampler import Resampler


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the token store, or what is missing of it, in one process or several; see ``conf/encode.yaml``."""
    from motionrag.cli import launch
    from motionrag.data.shards import ShardIndex

    ShardIndex.open(str(cfg.shards))  # before anything is loaded
    _share(cfg.array, 0)
    processes = launch.processes(cfg.trainer)
    return launch.start(processes, cfg, predict) if processes > 1 else predict(cfg)


def predict(cfg: DictConfig) -> dict[str, Any]:
    """Encode as this process's part."""
    import logging
    import warnings

    from hydra.utils import instantiate

    from motionrag.data.shards import ShardIndex
    from motionrag.lit.encoding import EncodeModule

    for library in ("lightning.pytorch", "lightning.fabric"):  # hardware lists and advertisements
        logging.getLogger(library).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*does not have many workers")  # a loader of numbers
    warnings.filterwarnings("ignore", "predict returned None")  # it wrote a part
    warnings.filterwarnings("ignore", "The `srun` command is available")
    warnings.filterwarnings("ignore", ".*isinstance\\(treespec, LeafSpec\\)")  # Lightning's, of PyTorch
    shards = ShardIndex.open(str(cfg.shards))
    encoders = instantiate(cfg.encoders, _convert_="all")
    resampler = _resampler(cfg, encoders) if cfg.resampler_weights else None
    first, step = _share(cfg.array, len(shards.shards))
    store = StoreWriter(
        shards, Path(str(cfg.out)), encoders, int(cfg.batch_size), float(cfg.max_bad), resampler, str(cfg.precision),
        slice(first, None, step), Path(str(cfg.resampler_weights)).name,
    )  # fmt: skip
    trainer = instantiate(
        cfg.trainer,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=str(cfg.out),
    )
    try:
        trainer.predict(EncodeModule(store.networks, store.mine, store.write), return_predictions=False)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # which Lightning makes this of
            raise end.__context__ from None
        raise
    if not trainer.is_global_zero:
        return {}
    counts = store.counts()
    array = f" of array={cfg.array}" if cfg.array else ""
    return {
        "summary": (
            f"{counts['clips']} clips in {len(store.mine)} part(s){array} -> {cfg.out}; {counts['kept']} part(s) were "
            f"there already, {len(counts['skipped'])} clip(s) skipped; next: motionrag index db={cfg.out}"
        ),
        "out": str(cfg.out),
        **counts,
    }


def encode(
    shards: ShardIndex, out: Path, encoders: Mapping[str, FrozenEncoder], batch_size: int, max_bad: float
) -> dict[str, Any]:
    """Encode the shards that ``out`` does not hold yet, in this process, where the encoders are.

    Arguments, result and errors: see :class:`StoreWriter`.
    """
    store = StoreWriter(shards, out, encoders, batch_size, max_bad)
    for shard in store.mine:
        store.write(shard)
    return store.counts()


class StoreWriter:
    """Writes a token store part by part; several processes may write different parts of one.

    encoders: motion, appearance and caption. max_bad: largest share (0..1) of all clips that may fail to decode.
    resampler: store its motion tokens in place of motion features. precision: of features and tokens, see
    ``retrieval/precision.py``. which: of the shards. resampler_name: for messages. Raises :class:`MotionRAGError` if ``out`` holds something else.
    """

    def __init__(
        self,
        shards: ShardIndex,
        out: Path,
        encoders: Mapping[str, FrozenEncoder],
        batch_size: int,
        max_bad: float,
        resampler: Resampler | None = None,
        precision: str = "fp16",
        which: slice = slice(None),
        resampler_name: str = "Resampler",
    ) -> None:
        from motionrag.data.sources import check_max_bad
        from motionrag.errors import MotionRAGError
        from motionrag.retrieval.bank import PARTS
        from motionrag.retrieval.precision import PRECISIONS

        if precision not in PRECISIONS:
            raise MotionRAGError(f"precision={precision}: choose from {', '.join(PRECISIONS)}")
        if batch_size < 1:
            raise MotionRAGError(f"batch_size={batch_size}: expected at least 1 clip")
        check_max_bad(max_bad)
        self.shards, self.out, self.encoders, self.resampler = shards, out, encoders, resampler
        self.batch_size, self.max_bad, self.precision = batch_size, max_bad, precision
        self.mine, self.resampler_name = shards.shards[which], resampler_name
        self.about = self._about()
        _open_store(out, self.about)
        self.kept = sum((out / PARTS / _name(shard)).is_dir() for shard in self.mine)
        self.skipped: list[dict[str, str]] = []

    @cached_property
    def networks(self) -> dict[str, Any]:
        """Encoders, and the Resampler if there is one."""
        return {**self.encoders, **({"resampler": self.resampler} if self.resampler else {})}

    def write(self, shard: Mapping[str, Any]) -> None:
        """Encode a shard that is not there yet; of one that is make sure that it was made of the same.

        Raises :class:`MotionRAGError` if it was not, the shard is damaged, or too much is bad.
        """
        from motionrag.errors import MotionRAGError
        from motionrag.retrieval.bank import PARTS, PartWriter, read_about

        place = self.out / PARTS / _name(shard)
        origin = {"shard": shard["file"], "sha256": shard["sha256"], "encoders": self.about["encoders"]}
        if place.is_dir():
            part = read_about(place)
            if {key: part.get(key) for key in origin} != origin:
                raise MotionRAGError(
                    f"{place} was made from another shard or by other encoders than {shard['file']} and these; delete "
                    "it or encode into a new folder"
                )
            self.skipped += part["skipped"]
            return
        from rich.progress import track

        from motionrag.cli import launch

        path = self.shards.verify(shard)
        bad: list[dict[str, str]] = []
        origin |= {"preview_frames": self.about["sampling"]["preview_frames"], "skipped": bad}
        with PartWriter(self.out, place.name, origin, self.precision) as writer:
            batches = self._batches(path, bad)
            total = -(-int(shard["clips"]) // self.batch_size)
            for batch in track(
                batches, f"encoding {place.name}", total, transient=True, disable=launch.rank() > 0
            ):
                self._add(writer, batch)
                self._stop_if_too_many(self.skipped + bad)
            self._stop_if_too_many(self.skipped + bad)
        self.skipped += bad

    def counts(self) -> dict[str, Any]:
        """Of all parts that were asked for, whoever wrote them: clips, kept (found at the start), encoded, skipped.

        Raises :class:`MotionRAGError` if too much is bad.
        """
        from motionrag.retrieval.bank import PARTS, read_about

        parts = [read_about(self.out / PARTS / _name(shard)) for shard in self.mine]
        skipped = [item for part in parts for item in part["skipped"]]
        self._stop_if_too_many(skipped)
        clips = sum(part["clips"] for part in parts)
        return {"clips": clips, "kept": self.kept, "encoded": len(self.mine) - self.kept, "skipped": skipped}

    def _about(self) -> dict[str, Any]:
        """What all parts of a store have in common."""
        from motionrag.encoders import fingerprint
        from motionrag.retrieval.database import RESAMPLER

        identities = {role: dict(encoder.identity) for role, encoder in self.encoders.items()}
        if self.resampler is not None:
            identities[RESAMPLER] = {
                "name": self.resampler_name,
                "width": self.resampler.output_dim,
                "tokens": self.resampler.tokens,
                "weights": fingerprint(self.resampler),
            }
        frames = self.encoders["motion"].frames
        return {
            "schema": "motionrag.store/1",
            "shards": [
                {key: shard[key] for key in ("file", "clips", "sha256")} for shard in self.shards.shards
            ],
            "encoders": identities,
            "sampling": {
                "motion": f"{frames} frames, first to last of the clip's span, uniformly",
                "appearance": "first frame of the span",
                "caption": "motion_caption",
                "preview_frames": min(8, frames),
            },
            "precision": self.precision,
        }

    def _batches(
        self, path: Path, bad: list[dict[str, str]]
    ) -> Iterator[tuple[tuple[ClipRecord, Clip], ...]]:
        decoded = _clips(path, self.encoders["motion"].frames, bad)
        while batch := tuple(islice(decoded, self.batch_size)):
            yield batch

    def _add(self, writer: Any, batch: tuple[tuple[ClipRecord, Clip], ...]) -> None:
        import torch

        motion, appearance, caption = (self.encoders[role] for role in ("motion", "appearance", "caption"))
        device = next(motion.parameters()).device
        clips, stills = [], []
        for _, clip in batch:
            # One clip at a time up to the networks' input: sizes differ. Bytes travel, floats are made there.
            video = torch.from_numpy(clip.frames).to(device).movedim(-1, 1).float() / 127.5 - 1
            clips.append(motion.pixels(video[None]))
            stills.append(appearance.pixels(video[:1]))
        found = motion.features(torch.cat(clips))
        if self.resampler is not None:
            with torch.no_grad():
                found = self.resampler(found)
        writer.add(
            [asdict(record) for record, _ in batch],
            found.float().cpu().numpy(),
            appearance.features(torch.cat(stills)).float().cpu().numpy(),
            caption.encode([record.motion_caption for record, _ in batch]).cpu().numpy(),
            [_preview(clip, min(8, motion.frames)) for _, clip in batch],
        )

    def _stop_if_too_many(self, skipped: list[dict[str, str]]) -> None:
        from motionrag.errors import MotionRAGError

        if len(skipped) > self.max_bad * len(self.shards):
            shown = ", ".join(f"{item['id']} ({item['reason']})" for item in skipped[:5])
            raise MotionRAGError(
                f"{len(skipped)} of {len(self.shards)} clips cannot be decoded, more than max_bad={self.max_bad:g} "
                f"allows: {shown}; pack the clips again or raise max_bad"
            )


def _name(shard: Mapping[str, Any]) -> str:
    """Of the part that a shard becomes."""
    return Path(shard["file"]).stem


def _share(array: str | None, shards: int) -> tuple[int, int]:
    """``I/N`` -> the first shard and the step to the next; raises :class:`MotionRAGError` for anything else."""
    from motionrag.errors import MotionRAGError

    if array is None:
        return 0, 1
    found = re.fullmatch(r"(\d+)/(\d+)", str(array))
    if not found or int(found[1]) >= int(found[2]):
        raise MotionRAGError(
            f"array={array}: expected I/N with I from 0 to N-1, as in array=$SLURM_ARRAY_TASK_ID/8 for --array=0-7"
        )
    return int(found[1]), int(found[2])


def _resampler(cfg: DictConfig, encoders: Mapping[str, FrozenEncoder]) -> Resampler:
    """The motion Resampler; raises :class:`MotionRAGError` unless it was trained on this motion encoder's features."""
    from hydra.utils import instantiate

    from motionrag.checkpoint import load_weights
    from motionrag.errors import MotionRAGError

    resampler = instantiate(cfg.resampler).eval().requires_grad_(False)
    manifest = load_weights(cfg.resampler_weights, resampler=resampler)
    named = manifest.get("about", {}).get("encoders", {}).get("motion", {})
    motion = encoders["motion"].identity
    if (
        named.get("weights", motion["weights"]) != motion["weights"]
    ):  # releases name theirs without a checksum
        raise MotionRAGError(
            f"{cfg.resampler_weights} was trained on motion features of {named['name']} (weights "
            f"{named['weights'][:8]}), this run encodes with {_short(motion)}: choose the encoder of that training"
        )
    return resampler


def _open_store(out: Path, about: dict[str, Any]) -> None:
    """Start a store, or make sure that the one at ``out`` is to be continued by these shards and encoders.

    Other processes may start it at the same time: parts come after the store's own file, whose hidden forerunner may
    be there.
    """
    from motionrag.errors import MotionRAGError
    from motionrag.io import write_json
    from motionrag.retrieval.database import RESAMPLER, STORE, about_motion, read_store, role_name

    there = out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir())
    if not (out / STORE).exists():
        if there or (out.exists() and not out.is_dir()):
            raise MotionRAGError(f"out={out} is there and is no token store; choose another folder")
        write_json(out / STORE, about)
        return
    stored = read_store(out)
    if (RESAMPLER in stored["encoders"]) != (RESAMPLER in about["encoders"]):
        raise MotionRAGError(
            f"out={out} holds {about_motion(stored['encoders'])}, this run makes {about_motion(about['encoders'])}; "
            "encode into a new folder"
        )
    for role, identity in about["encoders"].items():
        if stored["encoders"][role] != identity:
            raise MotionRAGError(
                f"out={out} was encoded with the {role_name(role)} {_short(stored['encoders'][role])}, this run uses "
                f"{_short(identity)}; use the same or encode into a new folder"
            )
    if stored.get("precision", "fp16") != about["precision"]:
        raise MotionRAGError(
            f"out={out} was encoded with precision={stored.get('precision', 'fp16')}, this run has "
            f"precision={about['precision']}; use the same or encode into a new folder"
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
