"""What CAMA and averaging make of the same nine references, without generating: `python experiments/fusion/tokens.py`.

Test clips, database and retriever are those of `experiment.yaml` beside this file; writes tokens.json. For each way and
domain, over the test clips, of the motion tokens less the mean of the database's:

- cosine: with those of the true clip
- right_motion: share whose nearest (by cosine) of the database's motions, each the mean of its clips, is the right one
- as_known: share whose nearest is a known motion
"""

import sys
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from motionrag.cli import conf_dir
from motionrag.cli.generate import build
from motionrag.evaluation.conditions import Generation, References
from motionrag.evaluation.split import read_split
from motionrag.generate import MotionRAG
from motionrag.io import write_json
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.group import open_database

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from run import world  # noqa: E402

WAYS = {"CAMA": "motionrag", "mean of tokens": "mean", "random, CAMA": "random"}


def main() -> None:
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        spec = OmegaConf.load(HERE / "experiment.yaml")
        folder, shards = world(**spec.world)
        cfg = compose("evaluate", overrides=[f"db={folder}", f"shards={shards}", *spec.common, "k=9"])
    db = open_database(folder)
    model = build(cfg)
    find = References(db, instantiate(cfg.retriever, db=db), int(cfg.k))
    tokens: dict[str, dict[str, list[torch.Tensor]]] = {}
    actions: dict[str, list[str]] = {}
    for clips in read_split(str(shards), model.backbone, None, 20):
        generation = Generation(model, find, clips, steps=1, guidance=1.0)
        ways = tokens.setdefault(clips.domain, {})
        actions.setdefault(clips.domain, []).extend(record["action"] for record in clips.records)
        for name, condition in {"true": "oracle", **WAYS}.items():
            ways.setdefault(name, []).append(generation.tokens(condition, 0).flatten(1))
    centre, motions = means(db, model)
    names = list(motions)
    stacked = torch.nn.functional.normalize(torch.stack(list(motions.values())), dim=1)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for domain, ways in tokens.items():
        true = torch.cat(ways["true"]) - centre
        for name in ["true", *WAYS]:
            made = torch.cat(ways[name]) - centre
            nearest = [names[i] for i in (made @ stacked.T).argmax(1).tolist()]
            right = [n[1] == action for n, action in zip(nearest, actions[domain], strict=True)]
            found.setdefault(name, {})[domain] = {
                "cosine": torch.cosine_similarity(made, true).mean().item(),
                "right_motion": sum(right) / len(right),
                "as_known": sum(n[0] == "known" for n in nearest) / len(nearest),
            }
    write_json(HERE / "tokens.json", found)
    for name, domains in found.items():
        for domain, values in domains.items():
            print(f"{name:>16} {domain:>6}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))


def means(
    db: RetrievalDatabase, model: MotionRAG
) -> tuple[torch.Tensor, dict[tuple[str, str], torch.Tensor]]:
    """The mean of all tokens (D,), and (domain, motion) -> the mean of its clips' less that."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in db.ids:
        clip = db.clip(row)
        rows.setdefault((clip["metadata"]["domain"], clip["action"]), []).append(row)
    tokens = {motion: model.motion_tokens(db.motion_features(ids)).flatten(1) for motion, ids in rows.items()}
    centre = torch.cat(list(tokens.values())).mean(0)
    return centre, {motion: part.mean(0) - centre for motion, part in tokens.items()}


if __name__ == "__main__":
    main()
