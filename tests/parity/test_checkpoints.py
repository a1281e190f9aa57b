"""The published checkpoints at full size: every key and shape, then files of exactly that layout there and back."""

import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel, UNetSpatioTemporalConditionModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from safetensors.torch import load_file

from motionrag.backbones.cogvideox import CogVideoX
from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.dynamicrafter_unet import DynamiCrafterUNet
from motionrag.backbones.svd import SVD
from motionrag.cli import conf_dir
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.release import RELEASES, expected_shapes, export_release, import_release, key_map

ROOT = Path(__file__).parents[2]
FOLDER = Path(os.environ.get("MOTIONRAG_PARITY_DIR", ROOT / ".." / "shared" / "parity"))

NAMES = {"cogvideox": "CogVideoX", "svd": "SVD", "dynamicrafter": "DynamiCrafter"}
NEVER_SAVED = {"sos_token": [1, 25, 1024]}  # of CAMA, in every release
QUERIES = "to_q_a_keys_not_saved_by_the_published_config"


@pytest.fixture(scope="module")
def listed():
    path = FOLDER / "checkpoint_keys.json"
    if not path.exists():
        pytest.skip(f"no {path.name} at {FOLDER}: set MOTIONRAG_PARITY_DIR")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def configs(listed):
    """Class of the backbone's network -> its sizes."""
    return listed["base_configs"]


@pytest.fixture(scope="module")
def published(listed):
    """Release -> file -> {"keys": {key: shape}, ...} as listed beside the parity cases."""
    files = listed["files"]
    return {
        name: {key.split("/")[-1]: entry for key, entry in files.items() if key.split("/")[1] == folder}
        for name, folder in NAMES.items()
    }


@pytest.fixture(scope="module")
def sizes():
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("import")
    return {"resampler": cfg.resampler, "cama": cfg.cama}


@pytest.mark.parametrize("name", RELEASES)
def test_every_key_and_shape(published, sizes, name):
    shapes = expected_shapes(RELEASES[name], sizes)
    maps = {file: keys for file, keys in key_map(RELEASES[name], shapes).items() if keys}
    assert maps.keys() == published[name].keys()
    for file, entry in published[name].items():
        may_be_absent = entry.get(QUERIES, {}) | (NEVER_SAVED if file == "motion_transformer.ckpt" else {})
        assert {key: list(shapes[ours]) for key, ours in maps[file].items()} == entry["keys"] | may_be_absent


def test_sites_are_those_of_our_backbones(published, configs):
    """The full-size networks, without weights: the same site names and widths, so imported adapters fit."""
    networks = {
        "cogvideox": (CogVideoX, CogVideoXTransformer3DModel, configs["CogVideoXTransformer3DModel"]),
        "svd": (SVD, UNetSpatioTemporalConditionModel, configs["UNetSpatioTemporalConditionModel"]),
        "dynamicrafter": (DynamiCrafter, DynamiCrafterUNet, {}),
    }
    for name, (backbone, network, config) in networks.items():
        with torch.device("meta"):
            built = SimpleNamespace(denoiser=network(**config))
        sites = backbone.adapter_sites(built)
        assert {site: module.to_out[0].in_features for site, module in sites.items()} == RELEASES[name].sites
        finetune = published[name].get("17_frames.ckpt", {"keys": {}})["keys"]
        parameters = dict(built.denoiser.named_parameters())
        for key, shape in finetune.items():
            assert list(parameters[key.removeprefix("transformer.")].shape) == shape


def test_nothing_of_ours_is_left_over(sizes):
    """The adapter and networks that generate builds at full size have exactly the imported keys."""
    with torch.device("meta"):
        nets = {"resampler": instantiate(sizes["resampler"]), "cama": instantiate(sizes["cama"])}
        for release in RELEASES.values():
            nets["motion_adapter"] = MotionAdapter({s: (w, 1) for s, w in release.sites.items()}, 1024)
            expected = {f"{part}.{k}" for part, net in nets.items() for k in net.state_dict()}
            found = {k for k in expected_shapes(release, sizes) if not k.startswith("backbone.")}
            assert found == expected


@pytest.fixture(scope="module")
def values():
    """(number, shape) -> random bf16 values between 0 and 2, others for every number.

    All lie in one random block, each number's from another place on, but as storages of their own, so that files hold
    each of them: gigabytes at no cost.
    """
    torch.manual_seed(0)
    block = torch.randint(0x3000, 0x4000, (3072 * 3072 + 1024,), dtype=torch.int16)

    def make(number, shape):
        size = torch.Size(shape).numel()
        storage = block.untyped_storage()[2 * number : 2 * (number + size)]
        return torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, torch.Size(shape))

    return make


def same(found, expected):
    """Whether two tensors agree; large ones are looked at in every 4097th place."""
    step = 1 if found.numel() < 1 << 20 else 4097
    return torch.equal(found.flatten()[::step], expected.flatten()[::step])


@pytest.fixture
def space(tmp_path):
    """A folder that is emptied afterwards: pytest would keep gigabytes."""
    if shutil.disk_usage(tmp_path).free < 12e9:
        pytest.skip(f"the published files need 9 GB for a moment, {tmp_path} has less than 12 GB free")
    yield tmp_path
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)


@pytest.fixture
def no_checksums():
    """torch.save without CRC32: a third of its time, nothing that these tests look at."""
    torch.serialization.set_crc32_options(False)
    yield
    torch.serialization.set_crc32_options(True)


@pytest.mark.parametrize("name", RELEASES)
def test_full_files_there_and_back(published, sizes, name, values, space, no_checksums):
    """Every published file at its full shapes -> ours -> back, 4.1 GB for CogVideoX, in less than 8 GB of memory."""
    theirs, ours, back = space / "theirs", space / "ours", space / "back"
    theirs.mkdir()
    numbers = {}  # key of our weights -> number of its values
    maps = key_map(RELEASES[name], expected_shapes(RELEASES[name], sizes))
    for file, entry in published[name].items():
        state = {}
        for key, shape in entry["keys"].items():
            state[key] = values(numbers.setdefault(maps[file][key], len(numbers)), shape)
        torch.save(state if entry["container"] == "flat dict" else {"state_dict": state}, theirs / file)
        bytes_, listed = sum(value.nbytes for value in state.values()), entry["total_bytes_bf16"]
        assert bytes_ == listed and abs((theirs / file).stat().st_size / listed - 1) < 0.002
        del state

    report = import_release(name, theirs, ours, sizes)
    assert {file: info["tensors"] for file, info in report["files"].items()} == {
        file: entry["n_tensors"] for file, entry in published[name].items()
    }
    assert {info["dtype"] for info in report["files"].values()} == {"bfloat16"} and report["missing"] == []
    queries = published[name]["Motion-Adapter.ckpt"].get(QUERIES, {})
    assert report["filled"] == [maps["Motion-Adapter.ckpt"][key] for key in queries] + ["cama.sos"]
    shutil.rmtree(theirs)
    left = set(numbers)
    for file in ours.glob("*.safetensors"):
        state = load_file(file)
        for key in state.keys() - set(report["filled"]):
            assert same(state[key], values(numbers[key], state[key].shape)), key
            left.remove(key)
    assert not left

    del state
    export_release(name, ours, back)
    for file, entry in published[name].items():
        state = torch.load(back / file, weights_only=True, mmap=True)
        state = state if entry["container"] == "flat dict" else state["state_dict"]
        assert {key: list(value.shape) for key, value in state.items()} == entry["keys"]
        for key, value in state.items():
            assert same(value, values(numbers[maps[file][key]], value.shape)), key
    assert (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 < 8e9
    )  # of all that this process has done
