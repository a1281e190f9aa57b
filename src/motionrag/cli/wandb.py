"""``motionrag wandb workspace|log``: the project's workspace from code, and evaluations as runs of W&B."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from omegaconf import DictConfig


def run(cfg: DictConfig) -> dict[str, Any]:
    """Write (and make) the workspace, or log evaluations; see ``conf/wandb.yaml`` for the keys."""
    from motionrag.errors import MotionRAGError

    what, *folders = map(str, cfg.what)
    if what == "workspace" and not folders:
        return workspace(cfg)
    if what == "log" and folders:
        urls = [log(Path(folder), cfg) for folder in folders]
        return {"summary": f"{len(urls)} evaluation(s): {', '.join(urls)}", "runs": urls}
    raise MotionRAGError("expected motionrag wandb workspace, or motionrag wandb log DIR...")


def workspace(cfg: DictConfig) -> dict[str, Any]:
    """Write the workspace's definition to the run folder; with ``create`` make it, which raises without a login."""
    import json

    import wandb
    import wandb_workspaces.workspaces as ws
    from hydra.core.hydra_config import HydraConfig
    from hydra.utils import instantiate

    from motionrag.errors import MotionRAGError
    from motionrag.io import write_json

    sections = [
        ws.Section(name=title, panels=[instantiate(panel) for panel in panels], is_open=True)
        for title, panels in cfg.sections.items()
    ]
    space = ws.Workspace(
        name=cfg.name,
        entity=cfg.entity or "",
        project=cfg.project,
        sections=sections,
        auto_generate_panels=False,
    )
    file = Path(HydraConfig.get().runtime.output_dir) / "workspace.json"
    write_json(file, json.loads(space._to_model().model_dump_json(by_alias=True, exclude_none=True)))
    for section in sections:
        names = [getattr(panel, "title", None) or panel.table_name for panel in section.panels]
        print(f"{section.name}: {', '.join(names)}")
    if not cfg.create:
        return {"summary": f"{len(sections)} sections -> {file} (create=true makes them)", "file": str(file)}
    if not wandb.api.api_key:
        raise MotionRAGError(f"create=true needs a login: wandb login, then again ({file} is written)")
    space.entity = cfg.entity or wandb.Api().default_entity
    try:
        url = space.save().url
    except Exception as error:  # refused, no network, ...: whatever the client raises
        raise MotionRAGError(f"W&B did not take the workspace ({error}); {file} is written") from error
    return {"summary": f"{len(sections)} sections -> {url}", "file": str(file), "url": url}


def log(folder: Path, cfg: DictConfig) -> str:
    """Log one evaluation's folder as a run; its address, or the folder of an offline run.

    Logged again, it stays that run. Summary: CONDITION/DOMAIN/METRIC. Table `clips`: a row for each kept clip, a column
    for each condition.
    """
    import wandb

    from motionrag.cli.train import wandb_logger
    from motionrag.errors import MotionRAGError
    from motionrag.io import read_json
    from motionrag.lit.callbacks import log_inputs

    if not (folder / "metrics.json").is_file():
        raise MotionRAGError(f"{folder} is no evaluation: expected metrics.json (motionrag evaluate)")
    result, clips = read_json(folder / "metrics.json"), read_json(folder / "clips.json")
    provenance = folder / "provenance.json"
    ran = read_json(provenance)["config"] if provenance.is_file() else {}
    group = cfg.group or ran.get("name") or ran.get("protocol") or folder.resolve().parent.name
    # the same folder is the same run, however often it is logged, but in another group another one
    run_id = hashlib.sha256(f"{group}/{folder.resolve()}".encode()).hexdigest()[:8]
    logger = wandb_logger(
        str(folder), project=cfg.project, entity=cfg.entity, job_type="evaluate", tags=list(cfg.tags), group=group,
        id=run_id,
    )  # fmt: skip
    done = logger.experiment
    done.config.update({**ran, **result["settings"]}, allow_val_change=True)
    for condition, domains in result["conditions"].items():
        for domain, metrics in domains.items():
            done.summary.update({f"{condition}/{domain}/{name}": value for name, value in metrics.items()})
    names = [name for name in result["conditions"] if any(name in clip["outputs"] for clip in clips)]
    table = wandb.Table(columns=["id", "domain", "prompt", "first frame", "reference", *names, "truth"])

    def video(file: str | None) -> Any:
        return wandb.Video(str(folder / file), format="mp4") if file else None

    for clip in clips:
        nearest = next((r.get("clip") for r in clip["references"]), None)
        table.add_data(
            clip["id"], clip["domain"], clip["prompt"], wandb.Image(str(folder / clip["first_frame"])), video(nearest),
            *(video(clip["outputs"].get(name)) for name in names), video(clip["truth"]),
        )  # fmt: skip
    done.log({"clips": table})
    databases = ran.get("db") or []
    databases = databases if isinstance(databases, list) else [databases]
    roles = {"database" if not i else f"database {i + 1}": db for i, db in enumerate(databases)}
    log_inputs(
        done, roles | {part: file for part, file in (ran.get("weights") or {}).items() if part != "folder"}
    )
    where = done.dir if done.offline else done.url
    done.finish()
    return str(Path(where).parent if done.offline else where)
