"""What reading training data costs: decoding, loader workers, memory, and what the token store saves in Stage 2."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pandas as pd
import torch
from omegaconf import DictConfig
from torch import Tensor

from motionrag.data.datamodule import MotionDataModule, ShardClips
from motionrag.data.packing import pack
from motionrag.data.video import Wanted, read_clip, read_clips, write_mp4
from motionrag.encoders import uniform_indices
from motionrag.errors import MotionRAGError

PARTS = ("decoding", "loader", "memory", "stage2")
FPS = 25
WANTED = {  # what is read of a clip: span in seconds, and how 16 frames are chosen
    "16 frames over the clip": {"frames": 16},
    "16 frames at 8 fps": {"frames": 16, "fps": 8.0, "end_sec": 2.0},
    "the same from the middle": {"frames": 16, "fps": 8.0, "start_sec": 0.5, "end_sec": 2.0},  # of the length
}
PEERS = ("", ", one converter")
SAMPLES = 4  # of a clip, of 49 frames at 8 a second


def run(
    resampler: DictConfig,
    cama: DictConfig,
    encoders: Mapping[str, Mapping[str, int]],
    clips: int = 24,
    seconds: float = 10.0,
    repeats: int = 5,
    passes: int = 3,
    parts: Sequence[str] = PARTS[:3],
    k: int = 9,
    batch_size: int = 2,
    folder: str = ".",
) -> dict[str, Any]:
    """Measure on made-up clips of 320 x 240; methods that are compared take turns, figures are medians of `repeats`.

    parts: which of PARTS to measure. Returns rows {what, unit, ours, peer, gain}, gain being how many times better:

    - decoding, CPU-ms for 16 frames: against decoding the span (from the file's start) and converting all of it to RGB,
      then choosing: each frame by itself as `frame.to_ndarray` does, or all by one shared converter; the pictures must
      be equal byte by byte, or it is an error; where torchcodec is installed, also against decoding by it;
    - the same for each of SAMPLES overlapping samples of a clip: all from one pass (ours) or one by one (peer);
    - loader, clips/s with two workers (ours) and one (peer); and the same decoding in two processes against one without
      any loader, which is what the machine gives;
    - memory, MB of all processes of a loader with two workers after the last pass (ours) and the first one (peer);
    - Stage 2 step, seconds by the wall and of the CPUs, with what it needs from the token store (ours) and with references read from video and
      encoded (peer), which is measured once; and with stored features that the motion Resampler still has to see.
    """
    if not parts or set(parts) - set(PARTS):
        raise MotionRAGError(f"bench.parts={list(parts)}: expected some of {', '.join(PARTS)}")
    rows: list[dict[str, Any]] = []
    with TemporaryDirectory(dir=folder) as place:
        shards = make_shards(Path(place), clips, seconds)
        if "decoding" in parts:
            rows += [row for name in WANTED for row in _decoding(Path(place), name, seconds, repeats)]
            rows.append(_samples(Path(place), seconds, repeats))
        if "loader" in parts:
            rows += _loader(shards, repeats)
        if "memory" in parts:
            rows.append(_memory(shards, passes))
        if "stage2" in parts:
            rows += _stage2(Path(place), resampler, cama, encoders, k, batch_size, repeats)
    gains = {row["what"]: row["gain"] for row in rows}
    told = {
        "decoding, 16 frames over the clip": "16 frames of a clip: {:.1f}x fewer CPU-ms",
        "loader, 1 -> 2 workers": "two workers {:.2f}x one",
        "machine, 1 -> 2 processes": "without a loader {:.2f}x",
        "memory, first -> last pass": "memory of the first pass {:.2f}x the last one's",
        "Stage 2 step, token store": "Stage 2 step {:.0f}x",
    }
    summary = "; ".join(text.format(gains[what]) for what, text in told.items() if what in gains)
    return {
        "summary": summary,
        "title": f"reading data, {clips} clips of {seconds:g} s, {os.cpu_count()} CPUs (those of one core share it), "
        f"{torch.get_num_threads()} threads, medians of {repeats}",
        "rows": rows,
    }


def make_shards(folder: Path, clips: int, seconds: float) -> Path:
    """Clips of a textured picture that slides, each in its own direction, packed; returns the shards."""
    rng = np.random.default_rng(0)
    (folder / "videos").mkdir()
    small = rng.integers(0, 255, (60, 80, 3), np.uint8)
    picture = np.tile(small.repeat(8, 0).repeat(8, 1), (2, 2, 1))
    count = round(seconds * FPS)
    for i in range(clips):
        x, y = (np.arange(count) * (1 + i % 3)) % 640, (np.arange(count) * (1 + i % 2)) % 480
        frames = np.stack([picture[b : b + 240, a : a + 320] for a, b in zip(x, y, strict=True)])
        write_mp4(folder / "videos" / f"{i:04d}.mp4", frames, FPS, crf=23)
    names = [f"{i:04d}.mp4" for i in range(clips)]
    table = {
        "video": names,
        "caption": "a picture",
        "motion_caption": [f"it slides, {i}" for i in range(clips)],
    }
    pd.DataFrame(table).to_csv(folder / "clips.csv", index=False)
    pack(folder / "clips.csv", folder / "videos", folder / "shards", shard_size=8)
    return folder / "shards"


# ---------------------------------------------------------------- decoding


def _decoding(folder: Path, name: str, seconds: float, repeats: int) -> list[dict[str, Any]]:
    options = dict(WANTED[name])
    if "start_sec" in options:
        options["start_sec"] *= seconds
        options["end_sec"] += options["start_sec"]
    methods = {
        "ours": read_clip,
        "": _decode_and_convert_all,
        ", one converter": partial(_decode_and_convert_all, shared=True),
    }
    peers = [*PEERS]
    if find_spec("torchcodec"):
        peers.append(", torchcodec")
        methods[peers[-1]] = lambda *args, **options: read_clip(*args, **options, decoder="torchcodec").frames
    times: dict[str, list[float]] = {method: [] for method in methods}
    for path in sorted((folder / "videos").iterdir())[:6]:
        data = path.read_bytes()
        for _ in range(repeats):
            pictures = {}
            for method, read in methods.items():
                start = time.process_time()
                pictures[method] = read(data, **options)
                times[method].append(1000 * (time.process_time() - start))
        if not all(np.array_equal(pictures["ours"].frames, pictures[peer]) for peer in peers):
            raise MotionRAGError(f"bench data: {name}: the pictures differ; this is a fault of motionrag")
    return [
        _row(f"decoding, {name}{peer}", "CPU-ms", times["ours"], times[peer], less_is_better=True)
        for peer in peers
    ]


def _samples(folder: Path, seconds: float, repeats: int) -> dict[str, Any]:
    methods: list[Callable[..., Any]] = [
        read_clips,
        lambda data, wanted: [read_clip(data, *want) for want in wanted],
    ]
    rng, times = np.random.default_rng(0), ([], [])
    for path in sorted((folder / "videos").iterdir())[:6]:
        data = path.read_bytes()
        for _ in range(repeats):
            starts = (np.arange(SAMPLES) + rng.random(SAMPLES)) / SAMPLES * max(seconds - 49 / 8, 0)
            wanted = [Wanted(start, None, 49, 8.0) for start in starts]
            pictures = []
            for read, taken in zip(methods, times, strict=True):
                begun = time.process_time()
                pictures.append(read(data, wanted))
                taken.append(1000 * (time.process_time() - begun) / SAMPLES)
            if not all(np.array_equal(a.frames, b.frames) for a, b in zip(*pictures, strict=True)):
                raise MotionRAGError("bench data: the samples differ; this is a fault of motionrag")
    return _row(f"decoding, {SAMPLES} samples of a clip together", "CPU-ms", *times, less_is_better=True)


def _decode_and_convert_all(
    data: bytes,
    frames: int,
    fps: float | None = None,
    start_sec: float = 0.0,
    end_sec: float = np.inf,
    shared: bool = False,
) -> np.ndarray:
    """Frames (frames,H,W,3) uint8 chosen after the whole span was decoded and converted, each frame by itself as
    `frame.to_ndarray` does it, or all by one shared converter."""
    import io

    how = {"format": "rgb24", "interpolation": "AREA", "threads": 1}
    pictures, times = [], []
    with av.open(io.BytesIO(data)) as box:
        box.streams.video[0].thread_count = 1
        scaler = av.video.reformatter.VideoReformatter()
        for frame in box.decode(video=0):
            if frame.time >= end_sec:
                break
            if frame.time >= start_sec:
                if shared:
                    pictures.append(scaler.reformat(frame, **how).to_ndarray())
                else:
                    pictures.append(frame.to_ndarray(**how))
                times.append(frame.time)
    if fps is None:
        chosen = uniform_indices(len(pictures), frames)
    else:
        moments = times[0] + np.arange(frames) / fps
        chosen = [int(np.abs(np.array(times) - moment).argmin()) for moment in moments]
    return np.stack([pictures[i] for i in chosen])


# ---------------------------------------------------------------- loader


def _batches(shards: Path, workers: int) -> Any:
    clips = ShardClips(shards, frames=16, height=224, width=224, fps=8)
    data = MotionDataModule(clips, batch_size=2, val_share=0, workers=workers)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1)
    return iter(data.train_dataloader()), len(clips.ids) // 2


def _loader(shards: Path, repeats: int) -> list[dict[str, Any]]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this process: it does nothing but wait
    speed: dict[int, list[float]] = {1: [], 2: []}
    alone: dict[int, list[float]] = {1: [], 2: []}
    loaders = {workers: _batches(shards, workers) for workers in speed}
    for batches, count in loaders.values():
        list(islice(batches, count))  # all workers are up, all files in the system's memory
    paths = sorted(str(path) for path in (shards.parent / "videos").iterdir())
    for _ in range(repeats):
        for workers in speed:
            batches, count = loaders[workers]
            # what was loaded ahead while the other ran would be counted for nothing
            list(islice(batches, 2 * workers))
            start = time.perf_counter()
            list(islice(batches, count))
            speed[workers].append(2 * count / (time.perf_counter() - start))
            time.sleep(1)  # its workers load ahead, which would slow down what is measured next
            with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
                list(pool.map(_sleepy, range(workers)))
                start = time.perf_counter()
                list(pool.map(_read, paths, chunksize=max(len(paths) // workers, 1)))
                alone[workers].append(len(paths) / (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return [
        _row("loader, 1 -> 2 workers", "clips/s", speed[2], speed[1]),
        _row("machine, 1 -> 2 processes", "clips/s", alone[2], alone[1]),
    ]


def _sleepy(_: int) -> None:
    time.sleep(0.05)


def _read(path: str) -> None:
    read_clip(path, frames=16, fps=8.0)


def _memory(shards: Path, passes: int) -> dict[str, Any]:
    batches, count = _batches(shards, 2)
    used = []
    for _ in range(passes):
        for _ in range(count):
            next(batches)
        used.append(sum(_proportional_mb(pid) for pid in [os.getpid(), *_children()]))
    return _row("memory, first -> last pass", "MB", used[-1:], used[:1], less_is_better=True)


def _children() -> list[int]:
    text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    return [int(pid) for pid in text.split()]


def _proportional_mb(pid: int) -> float:
    """Memory of a process, pages that several share divided between them."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("Pss:"))


# ---------------------------------------------------------------- Stage 2


def _stage2(
    folder: Path,
    resampler_cfg: DictConfig,
    cama_cfg: DictConfig,
    sizes: Mapping[str, Mapping[str, int]],
    k: int,
    batch_size: int,
    repeats: int,
) -> list[dict[str, Any]]:
    from hydra.utils import instantiate

    from motionrag.modules.cama import cama_losses, sequence_order

    torch.manual_seed(0)
    motion, appearance = _encoders(folder, sizes)
    resampler = instantiate(resampler_cfg).eval().requires_grad_(False)
    paths = sorted((folder / "videos").iterdir())
    need = [paths[i % len(paths)] for i in range(batch_size * (k + 1))]

    def encode(motion: Any, appearance: Any) -> tuple[Tensor, Tensor]:
        features, stills = [], []
        for path in need:  # one clip at a time: the batch of them would want gigabytes
            clip = read_clip(path.read_bytes(), frames=motion.frames)
            video = torch.from_numpy(clip.frames).movedim(-1, 1).float()[None] / 127.5 - 1
            features.append(motion(video))
            stills.append(appearance(video[:, 0]))
        return torch.cat(features), torch.cat(stills)

    def learn(tokens: Tensor, stills: Tensor) -> None:
        tokens, stills = (t.unflatten(0, (batch_size, k + 1)) for t in (tokens, stills))
        truth = sequence_order(tokens[:, 1:], tokens[:, 0])
        prediction = cama(tokens[:, 1:], stills[:, 1:], stills[:, 0])
        optimizer.zero_grad()
        cama_losses(prediction, truth)["mse"].backward()
        optimizer.step()

    @torch.no_grad()
    def resample(features: Tensor) -> Tensor:
        return torch.cat([resampler(part) for part in features.split(k + 1)])

    encoding = _Clock()
    features, stills = encode(motion, appearance)
    tokens = resample(features)
    encoding.stop()
    del motion, appearance  # the step of the peer would hold them; here they make room
    cama = instantiate(cama_cfg)
    optimizer = torch.optim.AdamW(cama.parameters(), lr=1e-4)
    learn(tokens, stills)  # makes the optimizer's state
    learning = _Clock()
    learn(tokens, stills)
    learning.stop()
    stored = _store(folder, {"tokens": tokens, "features": features, "stills": stills})
    del features, stills, tokens
    methods: dict[str, Callable[[], None]] = {
        "token store": lambda: learn(stored("tokens"), stored("stills")),
        "feature store": lambda: learn(resample(stored("features")), stored("stills")),
    }
    clocks: dict[str, list[_Clock]] = {name: [] for name in methods}
    for _ in range(repeats):
        for name, step in methods.items():
            clocks[name].append(_Clock())
            step()
            clocks[name][-1].stop()
    return [
        _row(
            f"Stage 2 step, {name}{', CPU time' if unit == 'CPU-s' else ''}",
            unit,
            [getattr(clock, kind) for clock in taken],
            [getattr(encoding, kind) + getattr(learning, kind)],
            less_is_better=True,
        )
        for kind, unit in (("wall", "s"), ("cpu", "CPU-s"))
        for name, taken in clocks.items()
    ]


class _Clock:
    """Seconds from its making to `stop`, by the wall and of all this process's threads (on a busy machine they differ)."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def stop(self) -> None:
        self.wall, self.cpu = time.perf_counter() - self.wall, time.process_time() - self.cpu


def _encoders(folder: Path, sizes: Mapping[str, Mapping[str, int]]) -> tuple[Any, Any]:
    """Encoders of these sizes with random weights, made and read as trained ones are."""
    from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEForVideoClassification

    from motionrag.encoders import AppearanceEncoder, MotionEncoder

    VideoMAEForVideoClassification(VideoMAEConfig(**sizes["motion"])).save_pretrained(folder / "motion")
    Dinov2Model(Dinov2Config(**sizes["appearance"])).save_pretrained(folder / "appearance")
    side = sizes["motion"]["image_size"]
    return MotionEncoder(str(folder / "motion"), size=side), AppearanceEncoder(
        str(folder / "appearance"), size=side
    )


def _store(folder: Path, values: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
    """Write arrays as the token store does, float16 and mapped; returns what reads one."""
    for name, value in values.items():
        np.save(folder / f"{name}.npy", value.half().numpy())
    mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in values}
    return lambda name: torch.from_numpy(np.array(mapped[name])).float()


def _row(
    what: str, unit: str, ours: list[float], peer: list[float], less_is_better: bool = False
) -> dict[str, Any]:
    a, b = statistics.median(ours), statistics.median(peer)
    return {"what": what, "unit": unit, "ours": a, "peer": b, "gain": b / a if less_is_better else a / b}
