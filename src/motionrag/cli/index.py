"""``motionrag index``: token store -> a retrieval database, and everything that changes or checks one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

WHAT = ("build", "add", "remove", "merge", "inspect", "verify")


def run(cfg: DictConfig) -> dict[str, Any]:
    """Build, change, describe or check the database; see ``conf/index.yaml`` for the keys."""
    from omegaconf import OmegaConf

    from motionrag.errors import MotionRAGError
    from motionrag.retrieval import changes
    from motionrag.retrieval.building import build
    from motionrag.retrieval.database import RetrievalDatabase

    if cfg.what not in WHAT:
        raise MotionRAGError(f"what={cfg.what}: expected {', '.join(WHAT)} (motionrag index --help)")
    db, others, clips, where = (
        [str(value)] if key in ("others", "clips") and not OmegaConf.is_list(value) else value
        for key, value in ((key, cfg[key]) for key in ("db", "others", "clips", "where"))
    )
    db = str(db)
    settings = {key: cfg[key] for key in ("kind", "memory_gb", "recall", "neighbours", "near_duplicate")}
    if cfg.what == "verify":
        counts = changes.verify(db)
        return {
            "summary": f"{db} is whole: {counts['files']} files, {_size(counts['bytes'])}",
            "db": db,
            **counts,
        }
    if cfg.what == "inspect":
        return _inspect(RetrievalDatabase(db))
    if cfg.what in ("add", "merge") and not others:
        raise MotionRAGError(f"motionrag index {cfg.what} needs others=[DB,DB]")
    if cfg.what == "remove":
        if bool(clips) == bool(where):
            raise MotionRAGError(
                "motionrag index remove needs clips=[ID,ID] or where=column=value, one of them"
            )
        named = list(clips) or RetrievalDatabase(db).where(where)
        if not named:
            raise MotionRAGError(f"db={db}: no clip meets where={where}, nothing is removed")
        manifest = changes.remove(db, named)
    elif cfg.what == "add":
        manifest = changes.add(db, list(others), bool(cfg.replace))
    elif cfg.what == "merge":
        manifest = changes.merge(db, list(others), **settings)
    else:
        manifest = build(db, **settings)
    index = manifest["index"]
    reached = "" if index["kind"] == "flat" else f", index {index['kind']} (recall {index['recall']:.3f})"
    return {
        "summary": f"{manifest['clips']} clips, {manifest['neighbours']['k']} neighbours each{reached} -> {db}",
        "db": db,
        **{key: manifest[key] for key in ("clips", "skipped", "encoders", "shapes", "index")},
    }


def _inspect(db: Any) -> dict[str, Any]:
    from motionrag.retrieval.database import FILES, about_encoder

    manifest = db.manifest
    parts = manifest["parts"]
    bytes_of: dict[str, int] = {}
    for part in parts:
        for name, file in part["files"].items():
            bytes_of[Path(name).stem] = bytes_of.get(Path(name).stem, 0) + file["bytes"]
    for role in FILES:
        if role in manifest:
            bytes_of[role] = (db.path / manifest[role]["file"]).stat().st_size
    removed = sum(len(part.get("removed", [])) for part in parts)
    index = {key: value for key, value in manifest["index"].items() if key not in ("file", "sha256")}
    sources = len(set(db.column("source")))
    about = {
        "clips": f"{len(db)} of {sources} sources in {len(parts)} parts; {removed} removed, {manifest['skipped']} skipped",
        **{role: about_encoder(identity) for role, identity in manifest["encoders"].items()},
        "index": ", ".join(f"{key} {value}" for key, value in index.items()),
        "neighbours": f"{manifest['neighbours']['k']}, near_duplicate {manifest['neighbours'].get('near_duplicate')}",
        "columns": ", ".join(db.columns),
        "disk": ", ".join(f"{name} {_size(size)}" for name, size in bytes_of.items()),
    }
    if stored := manifest.get("stored"):  # earlier versions do not tell
        error = ", ".join(f"{name} {value:g}" for name, value in stored["error"].items())
        about["stored"] = f"{', '.join(stored['precision'])}; relative error: {error or 'not measured'}"
    width = max(map(len, about))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in about.items()))
    return {
        "summary": f"{len(db)} clips in {db.path}, {_size(sum(bytes_of.values()))}",
        "db": str(db.path),
        "clips": len(db),
        "sources": sources,
        "removed": removed,
        "index": index,
        "bytes": bytes_of,
        **{key: manifest[key] for key in ("encoders", "shapes", "skipped", "neighbours")},
        "stored": manifest.get("stored"),
    }


def _size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
