"""Settings and helpers every test shares."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

# Before torch and the hub libraries are imported: small machines, and no test may reach a network.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

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
