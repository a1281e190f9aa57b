"""``motionrag demo``: every verb, one after the other, on synthetic clips and the tiny models that ship."""

from __future__ import annotations

import importlib
import shlex
import shutil
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from motionrag.cli.words import quote, quoted_override
from motionrag.errors import MotionRAGError


def run(cfg: DictConfig) -> dict[str, Any]:
    """Run the whole way; see ``conf/demo.yaml`` for the keys.

    Raises MotionRAGError if folders are in the way that no demo has made.
    """
    from PIL import Image

    from motionrag.data.motionworld import make_dataset
    from motionrag.data.video import read_clip

    out, started = Path(str(cfg.out)), time.perf_counter()
    make_room(out)
    steps = Steps()
    with steps.timed("render MotionWorld clips"):
        weights = {"known": 46.0, "new": 14.0}  # as many clips of each motion, on average
        make_dataset(out / "world", int(cfg.db_clips), int(cfg.seed) + 1, weights)
        for domain in ("known", "new"):
            make_dataset(
                out / "test" / domain, int(cfg.test_clips), int(cfg.seed) + 2, {domain: 1.0}, held_out=True,
                prefix=f"test-{domain}",
            )  # fmt: skip
        table, videos = join_tables([out / "test" / d for d in ("known", "new")], out / "test")
    world, test, db = (str(out / name) for name in ("world", "test", "db"))
    steps.verb("pack", f"table={world}/clips.csv", f"videos={world}/videos", f"out={world}/shards")
    steps.verb("pack", f"table={table}", f"videos={videos}", f"out={test}/shards")
    steps.verb("encode", f"shards={world}/shards", f"out={db}")
    # MotionWorld's captions are made of few phrases: clips with like ones are no copies
    steps.verb("index", f"db={db}", "near_duplicate=null")
    prompt, retriever = "follows a spiral that opens up", f"retriever={cfg.retriever}"
    steps.verb("retrieve", f"prompt='{prompt}'", f"db={db}", retriever, "k=3", f"out={out}/retrieve")
    if cfg.train_steps:
        live = [f"shards={world}/shards", f"db={db}", "logger=csv", f"trainer.max_steps={cfg.train_steps}"]
        live += [
            f"trainer.val_check_interval={max(int(cfg.train_steps) // 3, 1)}",
            "trainer.log_every_n_steps=5",
        ]
        adapter = f"run_dir={out}/train/adapter"
        trained = steps.verb("train", "experiment=tiny_adapter", "make=null", *live, adapter)
        live[0] = "shards=null"
        weights_file = f"resampler_weights={trained['weights']}"
        steps.verb(
            "train", "experiment=tiny_cama", "make=null", *live, weights_file, f"run_dir={out}/train/cama"
        )
    sampling = [f"{key}={cfg[key]}" for key in ("steps", "guidance", "motion_scale")]
    first = out / "generate" / "first_frame.png"
    first.parent.mkdir(exist_ok=True)
    clip = read_clip(videos / "new" / "videos" / "test-new-00000.mp4")
    Image.fromarray(clip.frames[0]).save(first)
    steps.verb(
        "generate",
        f"image={first}",
        f"prompt='{prompt}'",
        f"db={db}",
        retriever,
        f"k={cfg.k}",
        *sampling,
        f"out={first.with_name('video.mp4')}",
    )
    notes = [
        "The clips were made with the weights that ship; the loss curves are a short live training from fresh weights.",
        "No network has seen a motion of the new domain: its clips are only in the retrieval database.",
        "Test prompts use phrases that occur in no training caption and in no database.",
    ]
    evaluated = steps.verb(
        "evaluate", f"shards={test}/shards", f"db={db}", retriever, f"k={cfg.k}", *sampling, f"seed={cfg.seed}",
        f"save_clips={cfg.save_clips}", f"conditions=[{','.join(cfg.conditions)}]", f"out={out}",
        "notes=[" + ",".join(f"'{note}'" for note in notes) + "]",
    )  # fmt: skip
    steps.verb("report", f"runs=[{quote(str(out))}]", f"out={out}/report.html", "title='MotionRAG demo'")
    seconds = time.perf_counter() - started
    scores = evaluated["conditions"]
    new = ", ".join(f"{c} {scores[c]['new']['action_score']:.1f}" for c in list(cfg.conditions)[:2])
    return {
        "summary": f"Action Score on new motions: {new}; {seconds:.0f} s -> {out / 'report.html'}",
        "seconds": seconds,
        "seconds_per_step": steps.seconds,
        "conditions": scores,
    }


def make_room(out: Path) -> None:
    """Remove what an earlier demo left in `out`, and nothing else."""
    mark, names = out / ".demo", ("world", "test", "db", "train", "clips", "generate", "retrieve")
    there = [name for name in names if (out / name).exists()]
    if there and not mark.exists():
        raise MotionRAGError(
            f"out={out}: {', '.join(there)} there are not of a demo; choose another folder or move them away"
        )
    for name in there:
        shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)
    mark.touch()


class Steps:
    """Runs verbs inside this process, saying what one would type, and keeps the time of each."""

    def __init__(self):
        self.seconds: dict[str, float] = {}

    def timed(self, name: str):
        """Context that prints `name` and keeps how long it took."""
        return _Timed(self.seconds, name)

    def verb(self, verb: str, *overrides: str) -> dict[str, Any]:
        """`motionrag verb overrides...`, without starting Python again; returns its results."""
        from hydra import compose

        words = [word if shlex.quote(word) == word else f'"{word}"' for word in overrides]
        print(f"\n$ motionrag {verb} {' '.join(words)}", flush=True)
        with self.timed(verb):
            cfg = compose(config_name=verb, overrides=[quoted_override(word) for word in overrides])
            result = importlib.import_module(f"motionrag.cli.{verb}").run(cfg)
        print(result["summary"], flush=True)
        return result


class _Timed:
    def __init__(self, seconds: dict[str, float], name: str):
        self.seconds, self.name = seconds, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        self.seconds[self.name] = self.seconds.get(self.name, 0.0) + time.perf_counter() - self.start


def join_tables(folders: list[Path], out: Path) -> tuple[Path, Path]:
    """One table of several MotionWorld folders; returns it and the folder its video paths start from."""
    import pandas as pd

    tables = []
    for folder in folders:
        rows = pd.read_csv(folder / "clips.csv")
        rows["video"] = f"{folder.name}/videos/" + rows["video"]
        tables.append(rows)
    table = out / "clips.csv"
    pd.concat(tables).to_csv(table, index=False)
    return table, out
