"""Run one experiment of this folder and write its table and plot: `make experiment NAME=headline`.

`NAME/experiment.yaml` holds the question, what was concluded from the results beside it, the seeds and the arms; an arm
is a list of overrides of `motionrag evaluate` that leave one condition, and overrules `common`; `worlds` gives arms
a database of another size (ARM: {db_clips: N}). Where arms need weights
of their own, `trainings` names overrides of `motionrag train` (after those of `common_training`), and `trained:NAME`
stands for the weights file that this left. Every arm runs with all seeds, on the same test clips and the same noise.
An experiment of another kind names a `script` of its own instead.
`gate` names an arm that the baseline has to beat before anything is trained or compared (a backbone is competent if it
is better than its first frame, standing still).

Every arm and training is a run of the command line, `motionrag evaluate ...` or `motionrag train ...`, in a folder of
outputs/experiments with all that such a run leaves (config, provenance, clips, logs). The folder's name is made of the
overrides, the files that they name and the weights that ship; what is finished is not run again, also when another
experiment asks for it. Left in outputs/experiments/NAME: report.html, all arms side by side. Each arm is also a run in
W&B, of the group NAME (offline unless you are logged in; WANDB_MODE=disabled: not at all).

Written beside the yaml:

- results.json: per arm, domain and metric the mean over clips and seeds with its standard error, and the paired
  difference to the baseline arm with its own; for metrics of a whole set (FVD) the mean over seeds, their standard
  deviation and the number of samples; settings, seeds, seconds of generation, the commits that ran
  (a run is not repeated when code changes: remove outputs/experiments/runs for that); of trainings
  parameters, last validation loss and minutes
- table.md, plot.png: made of results.json alone (`run.py NAME --show` makes them again, with the yaml's words)

A standard error is over test clips: each clip's values are averaged over the seeds first, because one clip's seeds
are no independent evidence.
"""

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import shlex
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
from motionrag.cli.words import quoted_override
from motionrag.data.motions import motions
from motionrag.data.motionworld import make_dataset
from motionrag.errors import MotionRAGError
from motionrag.io import write_json, write_text
from motionrag.provenance import git_state
from motionrag.report import write_report

HERE = Path(__file__).parent
OUTPUTS = HERE.parent / "outputs" / "experiments"
WEIGHTS = HERE.parent / "src" / "motionrag" / "weights"
METRICS = {"action_score": ("Action Score", 1), "trajectory_error": ("path error, px", -1), "dino_score": ("DINO score", 1)}  # fmt: skip
SET_METRICS = {"fvd": ("FVD", -1)}  # no value for a clip, so no paired difference


def verb(name: str, *overrides: str) -> dict[str, Any]:
    """`motionrag NAME overrides...` inside this process, which keeps no run folder of its own."""
    cfg = compose(config_name=name, overrides=[quoted_override(word) for word in overrides])
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
        verb("index", f"db={db}", "near_duplicate=null")
        write_text(done, "")
    return db, shards


def run_arm(world_spec: dict[str, int], overrides: list[str]) -> Path:
    """The folder of one evaluation, which is run unless it was already with these weights."""
    overrides = settled(overrides)
    recipe = {"world": world_spec, "overrides": overrides}
    (condition,) = re.findall(r"^conditions=\[(\w+)\]$", "\n".join(overrides), flags=re.M)
    out = OUTPUTS / "runs" / f"{condition}-{recipe_key(overrides, world_spec)}"
    if not (out / "recipe.json").exists():
        db, shards = world(**world_spec)
        motionrag(
            "evaluate", f"db={db}", f"shards={shards}", *overrides, "save_clips=2", "resamples=0", out=out
        )
        commit = (git_state(HERE.parent) or {}).get("commit", "unknown")
        write_json(out / "recipe.json", recipe | {"commit": commit})
    return out


def recipe_key(overrides: list[str], world_spec: dict[str, int] | None = None) -> str:
    """A name for what is run, with the contents of the files that it names and of the weights that ship."""
    key = weights_hash()
    key.update(json.dumps(world_spec, sort_keys=True).encode())
    for text in overrides:
        name, _, value = text.partition("=")
        key.update(name.encode() + (Path(value).read_bytes() if Path(value).is_file() else value.encode()))
    return key.hexdigest()[:12]


def motionrag(name: str, *words: str, out: Path) -> None:
    """`motionrag NAME words...` into the run folder `out`; raises MotionRAGError if it fails."""
    command = [name, *words, f"hydra.run.dir={out}"]
    print(f"\n$ motionrag {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, "-m", "motionrag.cli", *command]).returncode:
        raise MotionRAGError(f"a run failed, as said above: motionrag {shlex.join(command)}")


def settled(overrides: list[str]) -> list[str]:
    """In one order, and of two for the same key the later: an arm's own word counts."""
    return sorted({text.partition("=")[0]: text for text in overrides}.values())


def with_weights(overrides: list[str], weights: dict[str, Path]) -> list[str]:
    """The overrides with `trained:NAME` replaced by that training's weights file."""
    return [re.sub(r"trained:(.+)", lambda found: str(weights[found[1]]), text) for text in overrides]


def train(overrides: list[str], group: str) -> tuple[Path, dict[str, Any]]:
    """The weights file that one training leaves, and its parameters, last validation loss and minutes.

    `overrides` are those of `motionrag train`. Trained unless it was already with the weights that ship.
    """
    out = OUTPUTS / "trained" / recipe_key(overrides)
    if not (out / "minutes.json").exists():
        start = time.monotonic()
        motionrag("train", *overrides, f"logger.wandb.group={group}", out=out)
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
        result = json.loads((folders[arm] / "metrics.json").read_text())
        (spread,) = result["spread"].values()  # one condition
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
                table[arm][domain][metric] |= result["samples"][domain][metric]
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


def check_gate(table: dict[str, Any], baseline: str, gate: str) -> None:
    """Raise MotionRAGError unless the baseline beats the arm `gate` in every domain, in the first two metrics."""
    for domain in table[baseline]:
        for metric in list(METRICS)[:2]:
            mine, theirs = (table[arm][domain][metric]["mean"] for arm in (baseline, gate))
            if (mine - theirs) * METRICS[metric][1] <= 0:
                raise MotionRAGError(
                    f"{baseline} is no better than {gate} on {domain} motions ({METRICS[metric][0]} {mine:.2f} against "
                    f"{theirs:.2f}): train it further before anything is compared with it"
                )


def markdown(results: dict[str, Any]) -> str:
    """How it was made, and one table for each domain; a difference of more than two standard errors is marked."""
    table, baseline, seeds = results["arms"], results["spec"]["baseline"], results["seeds"]
    some = next(iter(table[baseline].values()))
    made = [
        f"`{results['command']}`: {'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}; "
        f"{some['action_score']['clips']} test clips of each domain; {results['seconds']} s of generation; "
        f"commits {', '.join(commit[:7] for commit in results['commits'])}."
    ]
    if trainings := results.get("trainings"):
        of_each = [
            f"{name} {t['minutes']} min ({t['trainable_parameters']:,} parameters, validation loss {t['val_loss']:.4f})"
            for name, t in trainings.items()
        ]
        made.append(f"Trained: {'; '.join(of_each)}.")
    lines = [*made, ""]
    for domain in table[baseline]:
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
    lines.append(f"± is the standard error over test clips, for FVD the standard deviation over seeds; ▲ better, ▼ worse than {baseline} by more than two standard errors of the paired difference.")  # fmt: skip
    for metric, (heading, _) in SET_METRICS.items():
        samples, features = some[metric]["samples"], some[metric]["features"]
        few = f", fewer than its {features} features and so far above its limit: compare it only at equal counts"
        lines.append(f"{heading} is that of {samples} samples{few if samples < features else ''}.")
    return "\n".join([*lines, ""])


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


def main(name: str, show: bool, arm: str | None = None) -> None:
    folder = HERE / name
    if not (folder / "experiment.yaml").is_file():
        known = sorted(p.parent.name for p in HERE.glob("*/experiment.yaml"))
        raise MotionRAGError(f"NAME={name}: no such experiment; choose from {', '.join(known)}")
    spec = OmegaConf.to_container(OmegaConf.load(folder / "experiment.yaml"))
    if "script" in spec:
        command = [sys.executable, str(folder / spec["script"]), *(["--show"] if show else [])]
        raise SystemExit(subprocess.run(command).returncode)
    if show:
        results = json.loads((folder / "results.json").read_text())
        write(folder, results | {"question": spec["question"], "conclusion": spec["conclusion"]})
        return
    if arm:
        return check(folder, spec, arm)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        weights, trainings, folders = {}, {}, {}

        def evaluate(arm: str, overrides: list[str]) -> None:
            place = spec["world"] | spec.get("worlds", {}).get(arm, {})
            folders[arm] = run_arm(place, [*overrides, f"seeds={spec['seeds']}"])

        if "gate" in spec:  # before anything is trained, so without it
            for arm in (spec["baseline"], spec["gate"]):
                words = [*spec["common"], *spec["arms"][arm]]
                evaluate(arm, [word for word in words if "trained:" not in word])
            check_gate(summarise(folders, spec["baseline"]), spec["baseline"], spec["gate"])
        for training, overrides in spec.get("trainings", {}).items():
            weights[training], trainings[training] = train(
                with_weights([*spec.get("common_training", []), *overrides], weights), name
            )
        for arm, overrides in spec["arms"].items():
            if arm not in folders:
                evaluate(arm, with_weights([*spec["common"], *overrides], weights))
        folders = {arm: folders[arm] for arm in spec["arms"]}
        table = summarise(folders, spec["baseline"])
        if any(math.isnan(v["mean"]) for d in table.values() for m in d.values() for v in m.values()):
            raise MotionRAGError(f"{name}: a mean is not a number; remove {OUTPUTS / 'runs'} and run again")
        results = {key: spec[key] for key in ("question", "conclusion", "seeds") if key in spec}
        results["command"] = f"make experiment NAME={name}"
        results |= {"spec": spec, "seconds": generation_seconds(folders)}
        results["commits"] = sorted(
            {json.loads((f / "recipe.json").read_text())["commit"] for f in folders.values()}
        )
        results |= {"trainings": trainings} if trainings else {}
        write(folder, results | {"arms": table})
        runs, page = list(dict.fromkeys(folders.values())), OUTPUTS / name / "report.html"
        print(f"\n{write_report(runs, page, title=f'Experiment {name}')}", flush=True)
        os.environ.setdefault("WANDB_SILENT", "true")
        if os.environ.get("WANDB_MODE") != "disabled":
            logged = verb(
                "wandb",
                f"what=[log,{','.join(repr(str(run)) for run in runs)}]",
                f"group={name}",
                f"tags=[{name}]",
            )
            print(logged["summary"].partition(":")[0], f"in W&B's group {name}")


def check(folder: Path, spec: dict[str, Any], arm: str) -> None:
    """Run one arm without trained weights again; raises MotionRAGError unless its numbers are those of results.json."""
    if arm not in spec["arms"] or "trained:" in " ".join([*spec["common"], *spec["arms"][arm]]):
        able = [
            a for a, words in spec["arms"].items() if "trained:" not in " ".join([*spec["common"], *words])
        ]
        raise MotionRAGError(
            f"--check {arm}: choose an arm that needs no training: {', '.join(able) or 'none'}"
        )
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        place = spec["world"] | spec.get("worlds", {}).get(arm, {})
        again = run_arm(place, [*spec["common"], *spec["arms"][arm], f"seeds={spec['seeds']}"])
    results = json.loads((folder / "results.json").read_text())["arms"][arm]
    rows = []
    for domain, metrics in summarise({arm: again}, arm)[arm].items():
        for metric, found in metrics.items():
            rows.append((domain, metric, results[domain][metric]["mean"], found["mean"]))
    for row in rows:
        print("{}, {}: {:.6f} there, {:.6f} again".format(*row))
    if worst := [row for row in rows if not math.isclose(row[2], row[3], rel_tol=1e-3, abs_tol=1e-3)]:
        raise MotionRAGError(f"{folder.name}, {arm}: {len(worst)} of {len(rows)} numbers differ")


def write(folder: Path, results: dict[str, Any]) -> None:
    """results.json, table.md and plot.png in `folder`; the table is printed, too."""
    write_json(folder / "results.json", results)
    head = [f"# {folder.name}", *(results[k] for k in ("question", "conclusion") if k in results), ""]
    write_text(folder / "table.md", "\n\n".join(head) + markdown(results))
    plot(folder / "plot.png", results["arms"])
    print(markdown(results))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--show", action="store_true", help="run nothing: table and plot from results.json")
    parser.add_argument(
        "--check", metavar="ARM", help="run one arm again: are its numbers those of results.json?"
    )
    try:
        arguments = parser.parse_args()
        main(arguments.name, arguments.show, arguments.check)
    except MotionRAGError as error:
        raise SystemExit(f"error: {error}") from None
