"""What every run folder records about how its results came to be."""

from __future__ import annotations

import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from motionrag import __version__
from motionrag.io import atomic_path, write_json

PACKAGES = (
    "av",
    "diffusers",
    "faiss-cpu",
    "faiss-gpu",
    "hydra-core",
    "lightning",
    "numpy",
    "sentence-transformers",
    "torch",
    "torchmetrics",
    "transformers",
    "webdataset",
)


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result; absent ones are left out."""
    found = {"motionrag": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> dict[str, Any] | None:
    """``{"commit": str, "dirty": bool}`` of the checkout rooted at ``folder``; None when it is not one."""

    def git(*arguments: str) -> str | None:
        try:
            result = subprocess.run(
                ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20
            )
        except (FileNotFoundError, subprocess.TimeoutExpired):  # no git here: nothing to record
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    root = git("rev-parse", "--show-toplevel")
    # A package installed into an environment inside some other repository is not that repository's code.
    if root is None or Path(root).resolve() != folder.resolve():
        return None
    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return None if commit is None or status is None else {"commit": commit, "dirty": bool(status)}


def collect(cfg: DictConfig, verb: str, argv: list[str]) -> dict[str, Any]:
    """JSON-able record of a run: resolved config, seed, code, packages, command line, date, machine."""
    return {
        "verb": verb,
        "argv": list(argv),
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "seed": cfg.get("seed"),
        "git": git_state(Path(__file__).resolve().parents[2]),
        "versions": package_versions(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "executable": Path(sys.executable).name,
        "config": OmegaConf.to_container(cfg, resolve=True),
    }


def write(run_dir: str | Path, cfg: DictConfig, verb: str, argv: list[str]) -> dict[str, Any]:
    """Write ``provenance.json`` and the resolved ``config.yaml`` into ``run_dir``; return the record."""
    run_dir = Path(run_dir)
    record = collect(cfg, verb, argv)
    write_json(run_dir / "provenance.json", record)
    with atomic_path(run_dir / "config.yaml") as temporary:
        OmegaConf.save(cfg, temporary, resolve=True)
    return record
