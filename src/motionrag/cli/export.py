"""``motionrag export``: our weights -> checkpoints that the reference reads."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the files; see ``conf/export.yaml`` for the keys."""
    from motionrag.release import export_release

    report = export_release(str(cfg.release), str(cfg.path), str(cfg.out))
    for file, info in report["files"].items():
        print(f"wrote {file}: {info['tensors']} tensors, {info['parameters']:,} values, {info['dtype']}")
    return {
        "summary": f"{len(report['files'])} files of {cfg.release} -> {cfg.out}",
        "out": str(cfg.out),
        **report,
    }
