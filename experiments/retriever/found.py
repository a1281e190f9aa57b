"""How many references show the motion that a held-out prompt asks for: `python experiments/retriever/found.py`.

Test clips and database are those of `experiment.yaml` beside this file; writes found.json: for each retriever and
domain the share of right clips among the first 1, 3 and 9, averaged over the test clips.
"""

import csv
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from motionrag.cli import conf_dir
from motionrag.data.motions import motions
from motionrag.io import write_json
from motionrag.retrieval.database import RetrievalDatabase

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from run import world  # noqa: E402

DEPTHS, DOMAINS = (1, 3, 9), ("known", "new")


def main() -> None:
    shown = {p: m.name for domain in DOMAINS for m in motions(domain) for p in m.phrases}
    found: dict[str, dict] = {}
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        folder, _ = world(**OmegaConf.load(HERE / "experiment.yaml").world)
        db = RetrievalDatabase(folder)
        for name in ("text", "late_interaction"):
            retriever = instantiate(
                compose("retrieve", overrides=[f"db={folder}", f"retriever={name}"]).retriever, db=db
            )
            for domain in DOMAINS:
                with (folder.parent / "test" / domain / "clips.csv").open(newline="") as file:
                    prompts = list(csv.DictReader(file))
                right = []
                for row in prompts:
                    ids, _ = retriever.retrieve(row["motion_caption"], max(DEPTHS), set())
                    right.append([shown[db.motion_caption(i)] == row["action"] for i in ids])
                share = {str(k): round(sum(sum(r[:k]) / k for r in right) / len(right), 3) for k in DEPTHS}
                found.setdefault(name, {})[domain] = {"clips": len(prompts), **share}
                print(name, domain, found[name][domain])
    write_json(HERE / "found.json", found)


if __name__ == "__main__":
    main()
