"""``motionrag caption``: add motion captions to a table."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the new table; see ``conf/caption.yaml`` for the keys."""
    from hydra.utils import instantiate

    from motionrag.data.captions import caption_table

    captioner = instantiate(cfg.captioner)
    options = OmegaConf.to_container(cfg, resolve=True) | {"captioner": captioner}
    counts = caption_table(**options)
    for item in counts["failed"]:
        print(f"no motion caption for {item['clip']}: {item['reason']}")
    return {
        "summary": (
            f"{counts['written']} motion captions by {captioner.name} ({counts['from_cache']} captions were known), "
            f"{counts['had']} were there, {len(counts['failed'])} of {counts['rows']} rows without -> {cfg.out}"
        ),
        "out": str(cfg.out),
        "captioner": captioner.name,
        **counts,
    }
