"""Clips that are kept: a few for the report, all of them for VBench."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from motionrag.data.video import write_mp4
from motionrag.generate import to_uint8
from motionrag.io import atomic_path, write_json
from motionrag.retrieval.database import RetrievalDatabase

SHOWN_SIDE = 160  # kept clips are enlarged to about this, so that a browser shows them well
NAME_BYTES = 180  # of a file that is named after its prompt

Found = tuple[Sequence[str], np.ndarray]


class Gallery:
    """Keeps clips for the report: outputs, truth, first frame, references.

    per_domain: clips of each domain to keep, the first of them. db: where references come from, if there are any.
    """

    def __init__(self, out: Path, fps: float, per_domain: int, db: RetrievalDatabase | None = None):
        self.out, self.fps, self.db, self.per_domain = out, fps, db, per_domain
        self._left: dict[str, int] = {}
        self._entries: dict[str, dict[str, Any]] = {}

    def add(
        self,
        condition: str,
        records: Sequence[Mapping[str, Any]],
        truth: Tensor,
        video: Tensor,
        references: Callable[[], Sequence[Found]] | None = None,
    ) -> None:
        """Write one condition's videos (B, T, 3, H, W) of the clips that are kept.

        records: at least id, domain, caption, motion_caption of each clip. truth: their true clips. references: asked
        once a clip is new; the ids and scores of each clip's references.
        """
        for row, (record, true, one) in enumerate(zip(records, truth, video, strict=True)):
            entry = self._entries.get(record["id"]) or self._start(record, true, row, references)
            if entry is not None:
                entry["outputs"][condition] = self._write(
                    f"{file_name(record['id'])}_{condition}", enlarge(one)
                )

    def _start(
        self,
        record: Mapping[str, Any],
        true: Tensor,
        row: int,
        references: Callable[[], Sequence[Found]] | None,
    ) -> dict[str, Any] | None:
        left = self._left.setdefault(record["domain"], self.per_domain)
        if left == 0:
            return None
        self._left[record["domain"]] = left - 1
        clip_id, frames, name = record["id"], enlarge(true), file_name(record["id"])
        (self.out / "clips").mkdir(parents=True, exist_ok=True)
        Image.fromarray(frames[0]).save(self.out / "clips" / f"{name}_first.png")
        self._entries[clip_id] = {
            "id": clip_id, "domain": record["domain"], "prompt": record["caption"],
            "motion_prompt": record["motion_caption"], "first_frame": f"clips/{name}_first.png",
            "references": self._references(clip_id, *references()[row]) if references else [], "outputs": {},
            "truth": self._write(f"{name}_truth", frames),
        }  # fmt: skip
        return self._entries[clip_id]

    def _references(self, clip_id: str, ids: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"id": i, "caption": self.db.caption(i), "motion_caption": self.db.motion_caption(i), "score": float(s),
             "clip": self._write(f"{file_name(clip_id)}_ref{n}", self.db.preview(i))}
            for n, (i, s) in enumerate(zip(ids[:3], scores[:3], strict=True))
        ]  # fmt: skip

    def _write(self, name: str, frames: np.ndarray) -> str:
        write_mp4(self.out / "clips" / f"{name}.mp4", frames, self.fps)
        return f"clips/{name}.mp4"

    def write(self, scores: Mapping[str, Any]) -> None:
        """Write ``clips.json``. scores: clip id -> condition -> metric -> value."""
        entries = [{**entry, "scores": scores.get(i, {})} for i, entry in self._entries.items()]
        write_json(self.out / "clips.json", entries)


class VBench:
    """Writes videos as VBench reads custom input (arXiv 2311.17982, 2411.13503; github.com/Vchitect/VBench).

    A folder for each condition: `videos/NAME-I.mp4`, `I` counting seeds, `images/NAME.jpg`, the first frames under the
    same name, which VBench-I2V pairs by it, and `prompts.json`, file name -> prompt, for `--prompt_file`. NAME is the
    prompt, as VBench reads it from file names; where file systems forbid that, cut or with "/" replaced, and with the
    clip's id behind it where two clips would have one name.
    """

    def __init__(self, out: Path, fps: float):
        self.out, self.fps = out, fps
        self._names: dict[str, str] = {}
        self._prompts: dict[str, dict[str, str]] = {}

    def add(
        self, condition: str, index: int, records: Sequence[Mapping[str, Any]], first: Tensor, video: Tensor
    ) -> None:
        """Write videos (B, T, 3, H, W) of the seed number `index`, and their first frames (B, 3, H, W)."""
        folder = self.out / "vbench" / condition
        for record, image, one in zip(records, first, video, strict=True):
            name = self._name(record["id"], record["caption"])
            write_mp4(folder / "videos" / f"{name}-{index}.mp4", to_uint8(one), self.fps, crf=10)
            self._prompts.setdefault(condition, {})[f"{name}-{index}.mp4"] = record["caption"]
            with atomic_path(folder / "images" / f"{name}.jpg") as temporary:
                Image.fromarray(to_uint8(image)).save(temporary, quality=100, subsampling=0)

    def write(self) -> None:
        """Write the prompts."""
        for condition, prompts in self._prompts.items():
            write_json(self.out / "vbench" / condition / "prompts.json", prompts)

    def _name(self, clip_id: str, prompt: str) -> str:
        if clip_id not in self._names:
            clean = prompt.replace("/", " ").replace("\0", " ").strip().lstrip(".")
            name = clean.encode()[:NAME_BYTES].decode(errors="ignore") or file_name(clip_id)
            self._names[clip_id] = f"{name} ({file_name(clip_id)})" if name in self._names.values() else name
        return self._names[clip_id]


def file_name(clip_id: str) -> str:
    """An id as a part of a file's name, one for each id: slashes would make folders."""
    return clip_id.replace("%", "%25").replace("/", "%2F")


def enlarge(video: Tensor) -> np.ndarray:
    """(T, 3, H, W) in [-1, 1] -> uint8 (T, H', W', 3), small clips smoothly enlarged by a whole factor."""
    factor = max(SHOWN_SIDE // min(video.shape[-2:]), 1)
    return to_uint8(interpolate(video.float(), scale_factor=factor, mode="bicubic") if factor > 1 else video)
