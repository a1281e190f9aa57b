"""What CAMA and averaging make of the same nine references, without generating: `python experiments/fusion/tokens.py`.

Test clips, database and retriever are those of `experiment.yaml` beside this file; writes tokens.json. For each way and
domain, over the test clips, of the motion tokens less the mean of the database's:

- cosine: with those of the true clip
- kind: the same within the space spanned by the means of the database's motions: is it the right motion?
- rest: and outside of it: is it the right one of that motion, its place, size and speed?
- known_kind: of the part inside, the share of its length in the space of the known motions' means alone
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
    for clips in read_split(str(shards), model.backbone, None, 20):
        generation = Generation(model, find, clips, steps=1, guidance=1.0)
        ways = tokens.setdefault(clips.domain, {})
        for name, condition in {"true": "oracle", **WAYS}.items():
            ways.setdefault(name, []).append(generation.tokens(condition, 0).flatten(1))
    centre, kinds, known = spaces(db, model)
    found: dict[str, dict[str, dict[str, float]]] = {}
    for domain, ways in tokens.items():
        true = torch.cat(ways["true"]) - centre
        for name in ["true", *WAYS]:
            made = torch.cat(ways[name]) - centre
            kind, true_kind = made @ kinds @ kinds.T, true @ kinds @ kinds.T
            found.setdefault(name, {})[domain] = {
                "cosine": torch.cosine_similarity(made, true).mean().item(),
                "kind": torch.cosine_similarity(kind, true_kind).mean().item(),
                "rest": torch.cosine_similarity(made - kind, true - true_kind).mean().item(),
                "known_kind": ((kind @ known).norm(dim=1) / kind.norm(dim=1)).mean().item(),
            }
    write_json(HERE / "tokens.json", found)
    for name, domains in found.items():
        for domain, values in domains.items():
            print(f"{name:>16} {domain:>6}: " + ", ".join(f"{k} {v:.3f}" for k, v in values.items()))


def spaces(db: RetrievalDatabase, model: MotionRAG) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The mean of all tokens (D,), and bases (D, n) of what the means of all motions, and of the known ones, span."""
    rows: dict[tuple[str, str], list[str]] = {}
    for row in db.ids:
        clip = db.clip(row)
        rows.setdefault((clip["metadata"]["domain"], clip["action"]), []).append(row)
    means = {
        motion: model.motion_tokens(db.motion_features(ids)).flatten(1).mean(0)
        for motion, ids in rows.items()
    }
    sizes = torch.tensor([len(ids) for ids in rows.values()], dtype=torch.float32)
    stacked = torch.stack(list(means.values()))
    centre = (stacked * sizes[:, None]).sum(0) / sizes.sum()
    is_known = torch.tensor([domain == "known" for domain, _ in means])
    bases = (torch.linalg.qr((part - centre).T).Q for part in (stacked, stacked[is_known]))
    return centre, *bases


if __name__ == "__main__":
    main()
