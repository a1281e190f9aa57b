"""Run one experiment of this folder and write its table and plot: `make experiment NAME=headline`.

`NAME/experiment.yaml` holds the question, what was concluded from the results beside it, the seeds and the arms; an arm
is a list of overrides of `motionrag evaluate` that leave one condition, and overrules `common`; `worlds` gives arms
a database of another size (ARM: {db_clips: N}). Where arms need weights
of their own, `trainings` names overrides of `motionrag train` (after those of `common_training`), and `trained:NAME`
stands for the weights file that this left. Every arm runs with all seeds, on the same test clips and the same noise.
Finished runs and trainings are kept in outputs/experiments, under a name made of their overrides and the weights that
ship, and are not run again, also when another experiment asks for them. Written beside the yaml:

- results.json: per arm, domain and metric the mean over clips and seeds with its standard error, and the paired
  difference to the baseline arm with its own; for metrics of a whole set (FVD) the mean over seeds and their standard
  deviation; settings, seeds, seconds of generation, the commits that ran
  (a run is not repeated when code changes: remove outputs/experiments/runs for that); of trainings
  parameters, last validation loss and minutes
- table.md, plot.png

A standard error is over test clips: each clip's values are averaged over the seeds first, because one clip's seeds
are no independent evidence.
"""

import argparse
import hashlib
import importlib
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from motionrag.cli import conf_dir
from motionrag.cli.demo import join_tables
from motionrag.data.motions import motions
from motionrag.data.motionworld import make_dataset
from motionrag.errors import MotionRAGError
from motionrag.io import write_json, write_text
from motionrag.provenance import git_state

HERE = Path(__file__).parent
OUTPUTS = HERE.parent / "outputs" / "experiments"
WEIGHTS = HERE.parent / "src" / "motionrag" / "weights"
METRICS = {"action_score": ("Action Score", 1), "trajectory_error": ("path error, px", -1), "dino_score": ("DINO score", 1)}  # fmt: skip
SET_METRICS = {"fvd": ("FVD", -1)}  # no value for a clip, so no paired difference


def verb(name: str, *overrides: str) -> dict[str, Any]:
    """`motionrag NAME overrides...` inside this process."""
    cfg = compose(config_name=name, overrides=list(overrides))
    return importlib.import_module(f"motionrag.cli.{name}").run(cfg)


def weights_hash(*parts: str) -> Any:
    """Hash of all files that ship under WEIGHTS/tiny, or of those in some folders of it."""
    key = hashlib.sha256()
    for folder in [WEIGHTS / "tiny" / part for part in parts] or [WEIGHTS]:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            key.update(file.read_bytes())
    return key


def world(db_clips: int, test_clips: int, seed: int) -> tuple[Path, Path]:
    """Retrieval database and packed test split of MotionWorld; made once for each size, seed and pair of encoders."""
    encoders = weights_hash("videomae", "dinov2").hexdigest()[:8]
    root = OUTPUTS / f"world-{db_clips}-{test_clips}-{seed}-{encoders}"
    db, shards, done = root / "db", root / "test" / "shards", root / "done"
    if not done.exists():
        make_dataset(root / "world", db_clips, seed + 1, {"known": 46.0, "new": 14.0})
        for domain in ("known", "new"):
            folder = root / "test" / domain
            make_dataset(folder, test_clips, seed + 2, {domain: 1.0}, held_out=True, prefix=f"test-{domain}")
        table, videos = join_tables([root / "test" / d for d in ("known", "new")], root / "test")
        rows = pd.read_csv(table)
        # `query=phrase`: what retrieval could do if it were asked in the database's own words
        rows["phrase"] = rows.action.map({m.name: m.phrases[0] for d in ("known", "new") for m in motions(d)})
        rows.to_csv(table, index=False)
        verb("pack", f"table={root}/world/clips.csv", f"videos={root}/world/videos", f"out={root}/shards")
        verb("pack", f"table={table}", f"videos={videos}", f"out={shards}")
        verb("encode", f"shards={root}/shards", f"out={db}")
        verb("index", f"db={db}")
        write_text(done, "")
    return db, shards


def run_arm(world_spec: dict[str, int], overrides: list[str]) -> Path:
    """The folder of one evaluation, which is run unless it was already with these weights."""
    overrides = settled(overrides)
    recipe = {"world": world_spec, "overrides": overrides}
    key = weights_hash()
    key.update(json.dumps(recipe, sort_keys=True).encode())
    out = OUTPUTS / "runs" / key.hexdigest()[:16]
    if not (out / "metrics.json").exists():
        db, shards = world(**world_spec)
        verb(
            "evaluate",
            f"db={db}",
            f"shards={shards}",
            *overrides,
            f"out={out}",
            "save_clips=0",
            "resamples=0",
        )
        write_json(
            out / "recipe.json", recipe | {"commit": (git_state(HERE.parent) or {}).get("commit", "unknown")}
        )
    return out


def settled(overrides: list[str]) -> list[str]:
    """In one order, and of two for the same key the later: an arm's own word counts."""
    return sorted({text.partition("=")[0]: text for text in overrides}.values())


def with_weights(overrides: list[str], weights: dict[str, Path]) -> list[str]:
    """The overrides with `trained:NAME` replaced by that training's weights file."""
    return [re.sub(r"trained:(.+)", lambda found: str(weights[found[1]]), text) for text in overrides]


def train(overrides: list[str]) -> tuple[Path, dict[str, Any]]:
    """The weights file that one training leaves, and its parameters, last validation loss and minutes.

    `overrides` are those of `motionrag train`. Trained unless it was already with the weights that ship. Raises
    MotionRAGError if it fails.
    """
    key = weights_hash()
    key.update(json.dumps(overrides).encode())
    out = OUTPUTS / "trained" / key.hexdigest()[:16]
    if not (out / "minutes.json").exists():
        motionrag, start = [sys.executable, "-m", "motionrag.cli"], time.monotonic()
        words = ["train", *overrides, "logger=csv", f"hydra.run.dir={out}"]
        if subprocess.run([*motionrag, *words]).returncode:
            raise MotionRAGError(f"a training failed, as said above: motionrag {' '.join(words)}")
        write_json(out / "minutes.json", round((time.monotonic() - start) / 60, 1))
    results = json.loads((out / "results.json").read_text())
    about = {"trainable_parameters": results["trainable_parameters"], "val_loss": results["objective"]}
    about["minutes"] = json.loads((out / "minutes.json").read_text())
    return next((out / "weights").glob("*.safetensors")), about


def summarise(folders: dict[str, Path], baseline: str) -> dict[str, Any]:
    """Arm -> domain -> metric -> mean, standard error, and both of the paired difference to the baseline."""
    table: dict[str, Any] = {}
    runs = {arm: pd.read_csv(folder / "per_clip.csv") for arm, folder in folders.items()}
    for rows in runs.values():
        rows["domain"] = rows.id.str.split("-").str[1]
    for arm, rows in runs.items():
        spread = json.loads((folders[arm] / "metrics.json").read_text())["spread"]
        (spread,) = spread.values()  # one condition
        for domain in sorted(rows.domain.unique()):
            for metric in METRICS:
                mine, base = (
                    r[r.domain == domain].groupby("id")[metric].mean() for r in (rows, runs[baseline])
                )
                gain = (mine - base).dropna()
                table.setdefault(arm, {}).setdefault(domain, {})[metric] = {
                    "mean": mine.mean(), "standard_error": mine.sem(),
                    "difference": gain.mean(), "difference_standard_error": gain.sem(), "clips": len(mine),
                }  # fmt: skip
            for metric in SET_METRICS:
                seeds = pd.Series(spread[domain][metric]["seeds"])
                table[arm][domain][metric] = {"mean": seeds.mean(), "seeds": seeds.tolist()}
                if len(seeds) > 1:
                    table[arm][domain][metric]["standard_deviation"] = seeds.std()
    return table


def generation_seconds(folders: dict[str, Path]) -> int:
    """What generating all clips of all arms took, whenever it was done."""
    total = 0.0
    for folder in folders.values():
        result = json.loads((folder / "metrics.json").read_text())
        for domains in result["conditions"].values():
            clips = sum(row["seconds_per_clip"] * row["n"] for row in domains.values())
            total += clips * len(result["settings"]["seeds"])
    return round(total)


def markdown(table: dict[str, Any], baseline: str) -> str:
    """One table for each domain; a difference of more than two standard errors is marked."""
    lines = []
    for domain in next(iter(table.values())):
        lines += [
            f"**{domain} motions**",
            "",
            "| arm | " + " | ".join(h for h, _ in (METRICS | SET_METRICS).values()) + " |",
        ]
        lines.append("|---|" + "---|" * len(METRICS | SET_METRICS))
        for arm, domains in table.items():
            cells = []
            for metric, (_, sign) in METRICS.items():
                v = domains[domain][metric]
                text = f"{v['mean']:.2f} ± {v['standard_error']:.2f}"
                if arm != baseline and abs(v["difference"]) > 2 * v["difference_standard_error"]:
                    text += " ▲" if v["difference"] * sign > 0 else " ▼"
                cells.append(text)
            for metric in SET_METRICS:
                v = domains[domain][metric]
                cells.append(f"{v['mean']:.2f}" + (f" ± {v['standard_deviation']:.2f}" if "standard_deviation" in v else ""))  # fmt: skip
            lines.append(f"| {arm} | " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join([*lines, f"± is the standard error over test clips, for FVD the standard deviation over seeds; ▲ better, ▼ worse than {baseline} by more than two standard errors of the paired difference.", ""])  # fmt: skip


def plot(path: Path, table: dict[str, Any]) -> None:
    """Bars of Action Score and path error for each arm and domain."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [m for m in METRICS if m != "dino_score"]
    domains = list(next(iter(table.values())))
    figure, axes = plt.subplots(len(domains), len(shown), figsize=(10, 2.8 * len(domains)), squeeze=False)
    for row, domain in zip(axes, domains, strict=True):
        for axis, metric in zip(row, shown, strict=True):
            values = [table[arm][domain][metric] for arm in table]
            axis.bar(list(table), [v["mean"] for v in values], yerr=[v["standard_error"] for v in values], color="#4477aa", capsize=3)  # fmt: skip
            axis.set_title(f"{METRICS[metric][0]}, {domain} motions", fontsize=10)
            axis.set_xticks(range(len(table)), list(table), rotation=40, ha="right", rotation_mode="anchor", fontsize=8)  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main(name: str) -> None:
    folder = HERE / name
    if not (folder / "experiment.yaml").is_file():
        known = sorted(p.parent.name for p in HERE.glob("*/experiment.yaml"))
        raise MotionRAGError(f"NAME={name}: no such experiment; choose from {', '.join(known)}")
    spec = OmegaConf.to_container(OmegaConf.load(folder / "experiment.yaml"))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        weights, trainings, folders = {}, {}, {}
        for training, overrides in spec.get("trainings", {}).items():
            weights[training], trainings[training] = train(
                with_weights([*spec.get("common_training", []), *overrides], weights)
            )
        for arm, overrides in spec["arms"].items():
            overrides = with_weights([*spec["common"], *overrides], weights)
            place = spec["world"] | spec.get("worlds", {}).get(arm, {})
            folders[arm] = run_arm(place, [*overrides, f"seeds={spec['seeds']}"])
    table = summarise(folders, spec["baseline"])
    if any(math.isnan(v["mean"]) for d in table.values() for m in d.values() for v in m.values()):
        raise MotionRAGError(f"{name}: a mean is not a number; remove {OUTPUTS / 'runs'} and run again")
    about = {key: spec[key] for key in ("question", "conclusion", "seeds") if key in spec}
    about["command"] = f"make experiment NAME={name}"
    about |= {"spec": spec, "seconds": generation_seconds(folders)}
    about["commits"] = sorted(
        {json.loads((f / "recipe.json").read_text())["commit"] for f in folders.values()}
    )
    if trainings:
        about["trainings"] = trainings
    write_json(folder / "results.json", about | {"arms": table})
    head = "\n\n".join([f"# {name}", *(spec[k] for k in ("question", "conclusion") if k in spec), ""])
    write_text(folder / "table.md", head + markdown(table, spec["baseline"]))
    plot(folder / "plot.png", table)
    print(markdown(table, spec["baseline"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    try:
        main(parser.parse_args().name)
    except MotionRAGError as error:
        raise SystemExit(f"error: {error}") from None
