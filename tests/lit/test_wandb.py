"""What W&B is told: grouped runs, artifacts, lineage, evaluations, the workspace; and that it cannot stop a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import wandb
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf
from PIL import Image

from motionrag import cli
from motionrag.cli import train
from motionrag.data.video import write_mp4
from motionrag.lit.callbacks import SaveWeights, log_inputs


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """A new folder to work in, without a login; returns a function: run folder -> kind -> what an offline run kept."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staging"))

    def kept(folder):
        (file,) = folder.rglob("*.wandb")
        read = subprocess.run(
            [sys.executable, "-m", "wandb", "leet", "inspect", "--json", file],
            capture_output=True,
            check=True,
        )
        found = {}
        for record in map(json.loads, read.stdout.splitlines()):
            found.setdefault(record["type"], []).append(record[record["type"]])
        return found

    return kept


def updates(records) -> dict:
    """All keys and values of configuration or summary records."""
    return {key: value for record in records for key, value in record["update"].items()}


@pytest.fixture
def database(tmp_path):
    (tmp_path / "db").mkdir()
    (tmp_path / "db" / "manifest.json").write_text("{}")
    return tmp_path / "db"


def test_a_training_run(cama_module, fit, offline, database, tmp_path):
    words = OmegaConf.load(cli.conf_dir() / "logger" / "wandb.yaml")
    options = OmegaConf.to_container(
        OmegaConf.merge(words, {"name": "depth", "stage_name": "cama", "ckpt_path": None, "run_dir": ""}),
        resolve=True,
    )["wandb"]
    del options["_target_"], options["save_dir"]
    logger = train.wandb_logger(save_dir=str(tmp_path / "run"), **options)
    save = SaveWeights(tmp_path / "cama.safetensors", {"stage": "cama"}, {"database": database, "cama": None})
    fit(cama_module(), 1, save, logger=logger)
    wandb.finish()
    kept = offline(tmp_path / "run")
    (run,) = kept["run"]
    assert (run["run_group"], run["job_type"], run["tags"]) == ("depth", "cama", ["cama"])
    (artifact,) = kept["artifact"]
    assert artifact["type"] == "weights" and artifact["name"].startswith("cama-")
    assert {file["path"] for file in artifact["manifest"]["contents"]} == {"cama.safetensors", "cama.json"}
    inputs = updates(kept["config"])["inputs"]
    assert list(inputs) == ["database"] and inputs["database"].startswith("db-")


def test_inputs_are_the_artifacts_that_other_runs_logged(tmp_path, database, cama_module, fit, monkeypatch):
    run = SimpleNamespace(
        offline=False, used=[], logged=[], config=SimpleNamespace(update=lambda *_, **__: None)
    )
    run.use_artifact, run.log_artifact = run.used.append, run.logged.append
    monkeypatch.setattr(WandbLogger, "experiment", run)
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda *_, **__: None)
    weights = tmp_path / "cama.safetensors"
    fit(cama_module(), 1, SaveWeights(weights, {}, {"database": database}), logger=WandbLogger(offline=True))
    log_inputs(run, {"database": database, "cama": weights})
    assert [(a.type, a.name, a.digest) for a in run.used[1:]] == [
        (a.type, a.name, a.digest) for a in (*run.used[:1], *run.logged)
    ]


def test_no_server_and_no_package_stop_nothing(offline, tmp_path, monkeypatch, capsys):
    def init(**options):
        if options["mode"] == "online":
            raise wandb.errors.CommError("no route to host\nmore")
        return SimpleNamespace(define_metric=lambda *_, **__: None)

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr(wandb, "init", init)
    logger = train.wandb_logger(save_dir=str(tmp_path), project="p")
    assert logger._offline and logger.experiment
    assert "cannot be reached, the run is kept offline (no route to host)" in capsys.readouterr().out
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert train.wandb_logger(save_dir=str(tmp_path), project="p") is None
    assert "W&B is not installed" in capsys.readouterr().out


UNREACHABLE = """
import sys
import wandb
from motionrag.cli.train import wandb_logger
print(wandb_logger(sys.argv[1], project="p").experiment.offline)
wandb.finish()
"""


def test_a_server_that_does_not_answer(tmp_path, root, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    env = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_INIT_TIMEOUT": "2", "WANDB_API_KEY": "0" * 40}
    done = subprocess.run(
        [sys.executable, "-c", UNREACHABLE, tmp_path],
        env={**os.environ, **env, "PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert "cannot be reached, the run is kept offline" in done.stdout
    assert done.stdout.splitlines()[-1] == "True"
    (run,) = tmp_path.glob("wandb/offline-run-*")
    assert run.name.endswith((tmp_path / "wandb.id").read_text().strip())


def test_the_workspace_is_in_the_repository(offline, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(type(wandb.api), "api_key", None)
    assert cli.main(["wandb", "workspace", "hydra.run.dir=run"]) == 0
    assert "Retrieval depth: Action Score against k" in capsys.readouterr().out
    made = json.loads((tmp_path / "run" / "workspace.json").read_text())
    text = json.dumps(made)
    for panel in ("Run History Line Plot", "Bar Chart", "Scatter Plot", "Media Browser"):
        assert panel in text
    sections = OmegaConf.to_container(OmegaConf.load(cli.conf_dir() / "wandb.yaml").sections)
    plotted = {
        name
        for panels in sections.values()
        for panel in panels
        for name in panel.get("y", [])
        if "y" in panel
    }
    code = "".join(p.read_text() for p in (cli.conf_dir().parent / "src/motionrag/lit").glob("*.py"))
    assert all(f'"{name}"' in code for name in plotted if "/" in name)  # what panels show is logged
    assert cli.main(["wandb", "workspace", "create=true", "hydra.run.dir=run"]) == 2
    assert "needs a login: wandb login" in capsys.readouterr().err


def test_an_evaluation(offline, tmp_path, database, capsys):
    other = shutil.copytree(database, tmp_path / "other")
    folder = tmp_path / "depth" / "k=3"
    folder.mkdir(parents=True)
    write_mp4(folder / "a.mp4", np.zeros((4, 32, 32, 3), np.uint8), 8)
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    clip = {"id": "a", "domain": "new", "prompt": "it rolls", "first_frame": "a.png", "truth": "a.mp4"}
    clip |= {"references": [{"clip": "a.mp4"}], "outputs": {"backbone": "a.mp4", "motionrag": "a.mp4"}}
    conditions = {name: {"new": {"action_score": 20.0 + i}} for i, name in enumerate(clip["outputs"])}
    files = {
        "metrics": {"conditions": conditions, "settings": {"k": 3}},
        "clips": [clip],
        "provenance": {
            "config": {"db": [str(database), str(other)], "weights": {"cama": None, "folder": str(tmp_path)}}
        },
    }
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    assert cli.main(["wandb", "log", str(folder), "tags=[paper]", "hydra.run.dir=run"]) == 0
    kept = offline(folder)
    (run,) = kept["run"]
    assert (run["run_group"], run["job_type"], run["tags"]) == ("depth", "evaluate", ["paper"])
    assert updates(kept["config"])["k"] == 3
    assert list(updates(kept["config"])["inputs"]) == ["database", "database 2"]
    assert updates(kept["summary"])["motionrag/new/action_score"] == 21
    files = {file["path"]: file["local_path"] for file in kept["artifact"][0]["manifest"]["contents"]}
    table = json.loads(Path(files["clips.table.json"]).read_text())
    assert table["columns"] == [
        "id",
        "domain",
        "prompt",
        "first frame",
        "reference",
        "backbone",
        "motionrag",
        "truth",
    ]
    assert [cell["_type"] for cell in table["data"][0][3:]] == ["image-file", *["video-file"] * 4]
    for group in ("depth", "other"):  # the same run again; of another group, another one
        assert cli.main(["wandb", "log", str(folder), f"group={group}", "hydra.run.dir=run"]) == 0
    runs = [path.name.rpartition("-")[2] for path in folder.glob("wandb/offline-run-*")]
    assert len(runs) == 3 and len(set(runs)) == 2
    assert cli.main(["wandb", "log", str(tmp_path), "hydra.run.dir=run"]) == 2
    assert "is no evaluation: expected metrics.json" in capsys.readouterr().err
