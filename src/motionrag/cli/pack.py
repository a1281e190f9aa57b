"""``motionrag pack``: video files and a table of captions -> shards."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the shards; see ``conf/pack.yaml`` for the keys."""
    from motionrag.data.shards import pack

    options = OmegaConf.to_container(cfg, resolve=True)
    index = pack(**options)
    skipped, noted = index["skipped"], index["noted"]
    for item in skipped:
        print(f"skipped {item['video']}: {item['reason']}")
    for item in noted:
        print(f"noted {item['video']}: {item['note']}")
    return {
        "summary": (
            f"{index['clips']} of {index['rows']} clips in {len(index['shards'])} shard(s) -> {cfg.out}; "
            f"{len(skipped)} skipped, {len(noted)} with a note"
        ),
        "out": str(cfg.out),
        **{key: index[key] for key in ("rows", "clips", "shards", "columns", "skipped", "noted")},
    }
