"""``motionrag pack``: video files and a table of captions -> shards."""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write the shards; see ``conf/pack.yaml`` for the keys."""
    from motionrag.data.packing import pack

    options = OmegaConf.to_container(cfg, resolve=True)
    places = {key: str(options[key]) for key in ("videos", "out")}  # a folder may be called 2024
    index = pack(**options | places)
    skipped, noted = index["skipped"], index["noted"]
    for item in skipped:
        print(f"skipped {item['video']}: {item['reason']}")
    for item in noted:
        print(f"noted {item['video']}: {item['note']}")
    for name, split in index.get("splits", {}).items():
        print(f"split {name}: {split['clips']} of {split['rows']} clips -> {cfg.out}/{name}")
    more = [f"{count} rows left out ({reason})" for reason, count in index["left_out"].items()]
    if index["rule_captions"]:
        more.append(f"{index['rule_captions']} motion captions by rules")
    return {
        "summary": "; ".join(
            [
                f"{index['clips']} of {index['rows']} clips in {len(index['shards'])} shard(s) -> {cfg.out}",
                f"{len(skipped)} skipped, {len(noted)} with a note",
                *more,
            ]
        ),
        "out": str(cfg.out),
        **index,
    }
