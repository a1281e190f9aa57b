"""Round the trained tiny networks to float16 and put them where the package ships them.

    python ship.py networks                       # after the train_*.py scripts
    python ship.py stages ADAPTER.safetensors CAMA.safetensors

Networks are rounded before anything is trained on top of them, so every later stage sees what users will load.
"""

import sys
from pathlib import Path

import torch
from common import WEIGHTS
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from transformers import Dinov2Model, VideoMAEForVideoClassification

from motionrag.checkpoint import read_weights, save_weights
from motionrag.io import read_json, write_json

NETWORKS = {
    "vae": AutoencoderKLCogVideoX, "transformer": CogVideoXTransformer3DModel,
    "videomae": VideoMAEForVideoClassification, "dinov2": Dinov2Model,
}  # fmt: skip


def networks(names: list[str]) -> None:
    for name in names or NETWORKS:
        NETWORKS[name].from_pretrained(WEIGHTS / name).half().save_pretrained(WEIGHTS / name)
        config = WEIGHTS / name / "config.json"  # diffusers writes down where it read the model from
        write_json(config, {k: v for k, v in read_json(config).items() if k != "_name_or_path"})


def stages(paths: list[str]) -> None:
    for name, path in zip(("adapter", "cama"), paths, strict=True):
        state, manifest = read_weights(Path(path))
        half = {k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()}
        save_weights(WEIGHTS / f"{name}.safetensors", half, manifest["about"])


if __name__ == "__main__":
    {"networks": networks, "stages": stages}[sys.argv[1]](sys.argv[2:])
