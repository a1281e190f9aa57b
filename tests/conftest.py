"""Settings and helpers every test shares."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

# Before torch and the hub libraries are imported: small machines, and no test may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # as the command line does

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root folder."""
    return ROOT


@pytest.fixture
def motionrag(tmp_path):
    """Run ``motionrag ARGS...`` in a process of its own, inside ``tmp_path`` unless ``cwd`` is given."""

    def run(*args: str, cwd: Path = tmp_path, **env: str) -> subprocess.CompletedProcess:
        path = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
        return subprocess.run(
            [sys.executable, "-m", "motionrag.cli", *map(str, args)],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": path, **env},
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run


@pytest.fixture
def small_files():
    """`with small_files(n):` no file of this process can grow beyond `n` bytes: a disk that is full there."""

    @contextmanager
    def limited(size: int):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    return limited


@pytest.fixture(scope="session")
def random_encoders(tmp_path_factory) -> dict[str, str]:
    """Folders of untrained encoders, sizes of encoders=tiny but thinner: motion (8 frames of 32 x 32 -> 64 x 24,
    5 classes) and appearance (32 x 32 -> 17 x 24)."""
    import torch
    from transformers import Dinov2Config, Dinov2Model, VideoMAEConfig, VideoMAEForVideoClassification

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 24, "num_hidden_layers": 1}
    torch.manual_seed(0)
    models = {
        "motion": VideoMAEForVideoClassification(
            VideoMAEConfig(
                **sizes,
                num_frames=8,
                num_attention_heads=2,
                intermediate_size=32,
                num_labels=5,
                initializer_range=0.3,
            )
        ),
        "appearance": Dinov2Model(
            Dinov2Config(**sizes, num_attention_heads=2, mlp_ratio=2, initializer_range=0.3)
        ),
    }
    folder = tmp_path_factory.mktemp("encoders")
    for role, model in models.items():
        model.save_pretrained(folder / f"{role}-random")
    return {role: str(folder / f"{role}-random") for role in models}


@pytest.fixture(scope="session")
def random_models(tmp_path_factory, random_encoders) -> list[str]:
    """Overrides that point generate and evaluate at untrained models of the shipped kind, thinner and with an
    adapter that has an effect."""
    import torch
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from motionrag.backbones.cogvideox import CogVideoX
    from motionrag.checkpoint import save_weights

    folder = tmp_path_factory.mktemp("models")
    backbone = CogVideoX.tiny(text=str, num_layers=2)  # the text encoder is not saved
    for name, part in (("vae", backbone.vae), ("transformer", backbone.denoiser)):
        part.save_pretrained(folder / name)
    backbone.scheduler.save_pretrained(folder / "scheduler")
    sizes = ["resampler.embedding_dim=24", "cama.appearance_resampler.embedding_dim=24"]
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        cfg = compose("generate", overrides=[*sizes, "motion_adapter.init=reference"])
    torch.manual_seed(0)
    resampler, cama = instantiate(cfg.resampler), instantiate(cfg.cama)
    adapter = instantiate(cfg.motion_adapter)(backbone.adapter_sites(), token_width=resampler.output_dim)
    for prefix, parts in {
        "adapter": {"resampler": resampler, "motion_adapter": adapter},
        "cama": {"cama": cama},
    }.items():
        state = {
            f"{name}.{key}": value for name, part in parts.items() for key, value in part.state_dict().items()
        }
        about = {"sizes": {name: OmegaConf.to_container(cfg[name]) for name in ("resampler", "cama")}}
        save_weights(folder / f"{prefix}.safetensors", state, about)
    name, value = next(
        (n, p) for n, p in backbone.denoiser.named_parameters() if n.endswith("to_out.0.weight")
    )
    save_weights(folder / "finetuned.safetensors", {f"backbone.{name}": -value.detach()})
    return [
        *sizes,
        *(f"encoders.{role}.path={path}" for role, path in random_encoders.items()),
        f"backbone.path={folder}",
        f"weights.adapter={folder}/adapter.safetensors",
        f"weights.cama={folder}/cama.safetensors",
        f"weights.finetuned={folder}/finetuned.safetensors",
    ]


@pytest.fixture(scope="session")
def motionworld(tmp_path_factory) -> Path:
    """Folder with shards and database of 20 synthetic clips, encoded with the shipped encoders; shared by all test
    processes, so nobody may write into it."""
    from hydra import compose, initialize_config_dir

    from motionrag.cli.train import make_motionworld

    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "motionworld"
    with initialize_config_dir(version_base="1.3", config_dir=str(ROOT / "conf")):
        encoders = compose("train", overrides=["stage=adapter", "run_dir=.", "shards=.", "db=."]).encoders
    make_motionworld(str(folder), 20, 0, {"known": 1.0}, encoders)
    return folder


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """`publish("name/model", folder)`: the folder as the hub's own library keeps it after a download; no network."""
    import shutil

    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def run(repository: str, folder: Path) -> None:
        commit = "0123456789abcdef0123456789abcdef01234567"
        place = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
        shutil.copytree(folder, place / "snapshots" / commit)
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text(commit)

    return run


# What takes longest starts first, so that at the end no process waits for another's long file.
LONGEST = (
    "slurm/test_slurm.py", "test_plugin.py", "lit/test_sharding.py", "backbones/test_contract.py", "cli/test_evaluate_protocol.py",
    "cli/test_generate_evaluate_demo.py", "lit/test_resume.py", "lit/test_train.py", "test_sweeps.py", "lit/test_determinism.py",
)  # fmt: skip


def pytest_collection_modifyitems(items) -> None:
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


# Errors of the parity cases reach this file from whichever process ran them.
PARITY = Path(os.environ.get("MOTIONRAG_PARITY_DIR", ROOT / ".." / "shared" / "parity"))
worst: dict[str, list] = {}  # case -> worst error / tolerance, and the output it belongs to


def pytest_runtest_logreport(report) -> None:
    for name, value in report.user_properties:
        if name == "parity":
            case, *found = value
            worst[case] = max(worst.get(case, [0.0, found[1]]), found)


def pytest_terminal_summary(terminalreporter) -> None:
    """Every parity case by name with its worst error as a share of the tolerance."""
    manifest = PARITY / "manifest.json"
    if not manifest.exists():
        terminalreporter.section("PARITY NOT CHECKED", sep="!", red=True, bold=True)
        terminalreporter.line(f"no manifest.json in {PARITY}: set MOTIONRAG_PARITY_DIR to the parity folder")
    elif worst:
        terminalreporter.section("parity: worst error / tolerance")
        for entry in json.loads(manifest.read_text())["cases"]:
            share, key = worst.get(entry["case"], (None, ""))
            found = "not covered" if share is None else f"{share:.4f}  {key}"
            terminalreporter.line(f"{entry['case']:36s} {found}")
