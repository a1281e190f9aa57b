"""``motionrag index``: token store -> a retrieval database with a caption index."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write index, neighbours and manifest; see ``conf/index.yaml`` for the keys."""
    from motionrag.retrieval.database import build

    manifest = build(str(cfg.db), int(cfg.neighbours))
    return {
        "summary": f"{manifest['clips']} clips, {cfg.neighbours} neighbours each -> {cfg.db}",
        "db": str(cfg.db),
        **{key: manifest[key] for key in ("clips", "skipped", "encoders", "shapes")},
    }
