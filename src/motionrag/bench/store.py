"""How long it takes to open a token store, and to read the references of one sample from it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from motionrag.errors import MotionRAGError
from motionrag.io import write_json
from motionrag.retrieval.bank import PartWriter
from motionrag.retrieval.building import build
from motionrag.retrieval.database import STORE, RetrievalDatabase

CAPTION_WIDTH = 64
#: Clips that are made at a time.
BLOCK = 100


def run(
    clips: Sequence[int] = (10_000, 100_000),
    tokens: int = 25,
    width: int = 1024,
    appearance: tuple[int, int] = (257, 1024),
    appearance_up_to: int = 10_000,
    part: int = 1000,
    k: int = 9,
    reads: int = 200,
    folder: str = ".",
    seed: int = 0,
) -> dict[str, Any]:
    """Write a database of made-up features, open it, read the features of ``k`` random clips, remove it.

    Motion features are (tokens, width) float16, in parts of ``part`` clips; captions are short, as they are not read
    here. A store of at most ``appearance_up_to`` clips has appearance features of that shape, too; they are ten times
    as large. ``warm`` reads again, after all other reads, what is then in memory (not in a processor's cache) and was
    compared with its checksum.

    Returns rows {clips, disk_gb, write_s, index_s, open_ms, first_id_ms, read_ms, warm_ms, both_read_ms,
    both_warm_ms}: times are medians; first_id is the first look-up of a clip by its id, which lists them all; both
    reads motion and appearance features, None where there are none. Raises MotionRAGError if the disk lacks the space.
    """
    rows = []
    for count in clips:
        looks = tuple(appearance) if count <= appearance_up_to else (1, 1)
        wanted = count * ((tokens * width + looks[0] * looks[1]) * 2 + CAPTION_WIDTH * 4 + 2000) * 1.1
        if shutil.disk_usage(folder).free < wanted:
            raise MotionRAGError(
                f"{count} clips take {wanted / 1e9:.1f} GB and {folder} has less free; choose bench.folder or fewer clips"
            )
        with TemporaryDirectory(dir=folder) as place:
            path = Path(place) / "db"
            start = time.perf_counter()
            captions, _ = vectors_like_captions(np.random.default_rng(seed), count, CAPTION_WIDTH, 0)
            write(path, captions, (tokens, width), part, seed, looks)
            written = time.perf_counter()
            build(path)
            indexed = time.perf_counter()
            row = {
                "clips": count,
                "disk_gb": sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) / 1e9,
            }
            row |= {"write_s": written - start, "index_s": indexed - written}
            row |= measure(path, k, reads, seed, count <= appearance_up_to)
            rows.append(row)
    last = rows[-1]
    both = [row for row in rows if row["both_warm_ms"]]
    return {
        "summary": f"{last['clips']} clips: opened in {last['open_ms']:.3g} ms, {k} references in "
        f"{last['warm_ms']:.2g} ms warm"
        + "".join(f"; {row['clips']}, with appearance: {row['both_warm_ms']:.2g} ms" for row in both[-1:]),
        "title": f"token store, {tokens} x {width} float16, parts of {part}, {k} random references, medians of {reads}",
        "rows": rows,
    }


def vectors_like_captions(
    rng: np.random.Generator, clips: int, width: int, queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Vectors (clips, width) and queries (queries, width) float32 of length 1 around clips/50 centres."""
    centres = rng.standard_normal((max(clips // 50, 1), width), np.float32)
    both = rng.standard_normal((clips + queries, width), np.float32)
    both += centres[rng.integers(0, len(centres), len(both))]
    both /= np.linalg.norm(both, axis=1, keepdims=True)
    return both[:clips], both[clips:]


def write(
    path: Path,
    captions: np.ndarray,
    shape: tuple[int, int],
    part: int,
    seed: int,
    appearance: tuple[int, int] = (1, 1),
) -> None:
    """A token store at ``path`` of clips with captions (clips, width), every clip from a source of its own.

    Motion features are of ``shape``; appearance features are, too, of theirs.
    """
    rng, clips = np.random.default_rng(seed), len(captions)
    motion, looks = (
        rng.standard_normal((min(BLOCK, part), *values), np.float32).astype(np.float16)
        for values in (shape, appearance)
    )
    preview = np.zeros((1, 8, 8, 3), np.uint8)
    identity = {"name": "none", "width": captions.shape[1], "weights": "0" * 64}
    starts = range(0, clips, part)
    store = {
        "shards": [{"file": f"clips-{n:06d}.tar"} for n in range(len(starts))],
        "encoders": dict.fromkeys(("motion", "appearance", "caption"), identity),
        "sampling": {},
    }
    write_json(path / STORE, store)
    for n, start in enumerate(starts):
        end = min(start + part, clips)
        with PartWriter(path, f"clips-{n:06d}", {"skipped": [], "preview_frames": 1}) as writer:
            for at in range(start, end, len(motion)):
                numbers = range(at, min(at + len(motion), end))
                records = [
                    {
                        "id": f"clip-{i:08d}",
                        "caption": f"a clip, number {i}, of something that moves",
                        "motion_caption": f"something moves in way {i}",
                        "source": f"film-{i:08d}.mp4",
                        "metadata": {"split": "train"},
                    }
                    for i in numbers
                ]
                count = len(numbers)
                writer.add(
                    records, motion[:count], looks[:count], captions[at : at + count], [preview] * count
                )


def measure(path: Path, k: int, reads: int, seed: int, appearance: bool) -> dict[str, float | None]:
    """Medians in ms: open, first_id, read (as the pages are), warm; both_read and both_warm with ``appearance``."""
    times = {"open_ms": [_ms(lambda: RetrievalDatabase(path)) for _ in range(9)]}
    rng = np.random.default_rng(seed)
    for both in (False, True)[: 1 + appearance]:
        db = RetrievalDatabase(path)  # which has compared nothing with its checksum yet
        times.setdefault("first_id_ms", [_ms(lambda db=db: db.row("clip-00000000"))])
        chosen = [[db.ids[row] for row in rng.integers(0, len(db), k)] for _ in range(reads)]
        kinds = (db.motion_features, db.appearance_features)[: 1 + both]
        for name in ("read_ms", "warm_ms"):
            times["both_" * both + name] = [
                _ms(lambda ids=ids, kinds=kinds: [kind(ids) for kind in kinds]) for ids in chosen
            ]
    medians = {name: float(np.median(values)) for name, values in times.items()}
    return medians | {name: medians.get(name) for name in ("both_read_ms", "both_warm_ms")}


def _ms(work: Any) -> float:
    start = time.perf_counter()
    work()
    return 1000 * (time.perf_counter() - start)
