"""Videos that anyone made, and the true ones: folders matched by the names of their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from motionrag.data.video import UnreadableVideo, read_clip
from motionrag.errors import MotionRAGError
from motionrag.generate import fit, to_float

SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".gif"})
NAMED = 5  # files that a message names at most


@dataclass
class Folders:
    """Clips under the same names in several folders.

    ids: names of the files without suffix, sorted. made: condition -> clip id -> file. truth: clip id -> file.
    prompts, domains: clip id -> text; prompts is empty without a table.
    """

    ids: list[str]
    made: dict[str, dict[str, Path]]
    truth: dict[str, Path]
    prompts: dict[str, str]
    domains: dict[str, str]

    def read(self, clip_id: str) -> tuple[dict[str, Tensor], Tensor, float]:
        """Condition -> video (T, 3, H, W) in [-1, 1], the true video, and its frame rate.

        All come at the size of the first condition's: scaled until they cover it, then centre-cropped.
        """
        true = read_clip(self.truth[clip_id])
        made = {name: to_float(read_clip(files[clip_id]).frames) for name, files in self.made.items()}
        height, width = next(iter(made.values())).shape[-2:]
        made = {name: fit(video, height, width) for name, video in made.items()}
        return made, fit(to_float(true.frames), height, width), true.fps


def open_folders(made: Mapping[str, str | Path], truth: str | Path, prompts: str | Path | None) -> Folders:
    """Match the folders and look at every file.

    made: condition -> folder. prompts: CSV with columns `video` (file name), `caption`, and, if there are several,
    `domain`. Raises MotionRAGError naming files if a folder is missing or empty, names differ between folders, a
    file cannot be read, clips of one name differ in length, or a clip has no prompt.
    """
    found = {name: _videos(f"clips={folder}", Path(folder)) for name, folder in made.items()}
    true = _videos(f"truth={truth}", Path(truth))
    for name, files in found.items():
        extra, lacking = sorted(files.keys() - true.keys()), sorted(true.keys() - files.keys())
        if extra or lacking:
            parts = [f"{len(extra)} only in {made[name]} ({_some(extra)})"] if extra else []
            parts += [f"{len(lacking)} only in {truth} ({_some(lacking)})"] if lacking else []
            raise MotionRAGError(
                f"clips={made[name]} and truth={truth} do not match by file name: {', '.join(parts)}; "
                "give every clip the name of its true clip, and remove what has no partner"
            )
    ids = sorted(true)
    _check_lengths(ids, found, true)
    table = _read_prompts(Path(prompts), ids) if prompts else {}
    return Folders(
        ids,
        found,
        true,
        {clip_id: row["caption"] for clip_id, row in table.items()},
        {clip_id: table.get(clip_id, {}).get("domain") or "all" for clip_id in ids},
    )


def _videos(key: str, folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise MotionRAGError(f"{key}: no such folder; give a folder of videos")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise MotionRAGError(
                    f"{key}: {found[path.stem].name} and {path.name} have one name; keep one"
                )
            found[path.stem] = path
    if not found:
        raise MotionRAGError(f"{key}: no videos there; expected files *{', *'.join(sorted(SUFFIXES))}")
    return found


def _check_lengths(
    ids: Sequence[str], made: Mapping[str, Mapping[str, Path]], true: Mapping[str, Path]
) -> None:
    bad, unequal = [], []
    for clip_id in ids:
        files = [true[clip_id], *(files[clip_id] for files in made.values())]
        lengths = []
        for file in files:
            try:
                # every frame: damage behind the last wanted one goes unseen
                clip = read_clip(file, short_side=16)
            except UnreadableVideo as error:
                bad.append(f"{file}: {error.reason}")
                continue
            if clip.note:
                bad.append(f"{file}: {clip.note}")
            lengths.append(clip.decoded)
        unequal += [
            f"{file} has {length} frames, {files[0]} {lengths[0]}"
            for file, length in zip(files, lengths, strict=False)
            if length != lengths[0]
        ]
    if bad:
        raise MotionRAGError(f"{len(bad)} clips cannot be read: {_some(bad, '; ')}; make them again")
    if unequal:
        raise MotionRAGError(
            f"{len(unequal)} clips are not as long as their true clips: {_some(unequal, '; ')}; cut both to the same "
            "frames"
        )


def _read_prompts(path: Path, ids: Sequence[str]) -> dict[str, dict[str, str]]:
    import pandas as pd

    try:
        rows = pd.read_csv(path, dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise MotionRAGError(
            f"prompts={path}: no such file; give a CSV with columns video, caption"
        ) from error
    except (ValueError, OSError) as error:  # pandas' own parsing errors are ValueErrors
        raise MotionRAGError(f"prompts={path}: not a readable CSV ({error})") from error
    if missing := sorted({"video", "caption"} - set(rows)):
        raise MotionRAGError(
            f"prompts={path}: no column {', '.join(missing)}; it has {', '.join(rows)}, expected video, caption"
        )
    names = rows["video"].map(lambda video: Path(video).stem)
    if twice := sorted(set(names[names.duplicated()]) & set(ids)):
        raise MotionRAGError(
            f"prompts={path}: {len(twice)} clips have several rows ({_some(twice)}); keep one of each"
        )
    table = dict(zip(names, rows.to_dict("records"), strict=True))
    if lacking := [clip_id for clip_id in ids if not table.get(clip_id, {}).get("caption")]:
        raise MotionRAGError(
            f"prompts={path}: no caption for {len(lacking)} clips ({_some(lacking)}); add them"
        )
    return {clip_id: table[clip_id] for clip_id in ids}


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return separator.join(names[:NAMED]) + more
