"""Released checkpoints at toy size: the reference's layout is spelled out here, not taken from the code under test."""

import os
import pickle
import random
import shutil

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from motionrag import release as release_module
from motionrag.backbones.base import MotionInput
from motionrag.backbones.cogvideox import CogVideoX
from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.svd import SVD
from motionrag.checkpoint import load_weights, read_weights, save_weights
from motionrag.cli import conf_dir
from motionrag.errors import MotionRAGError
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.release import (
    RELEASES,
    _read_checkpoint,
    export_release,
    import_release,
    load_cogvideox,
    load_finetune,
)

TOKENS, WIDTH = 3, 16
SITES = {
    "cogvideox": {"transformer_blocks.0.attn1": 160, "transformer_blocks.1.attn1": 160},
    "svd": {
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2": 8,
        "mid_block.attentions.0.transformer_blocks.0.attn2": 12,
    },
    "dynamicrafter": {
        "input_blocks.1.1.transformer_blocks.0.attn2": 8,
        "middle_block.1.transformer_blocks.0.attn2": 12,
    },
}
# The reference's keys of one site's to_k, to_v, to_q.
SITE_KEYS = {
    "cogvideox": "transformer.{}.processor.{}_ip.0.weight",
    "svd": "unet.{}.processor.{}_ip.0.weight",
    "dynamicrafter": "model.diffusion_model.{}.{}_a.weight",
}


@pytest.fixture(scope="module")
def sizes():
    """Configs of a Resampler and a CAMA of a few thousand weights."""
    words = [f"{p}{k}={v}" for p in ("resampler.", "cama.appearance_resampler.") for k, v in
             {"dim": 8, "depth": 1, "heads": 2, "dim_head": 4, "num_queries": TOKENS, "output_dim": WIDTH}.items()]  # fmt: skip
    words += ["resampler.embedding_dim=6", "cama.appearance_resampler.embedding_dim=5"]
    words += [f"cama.{k}={v}" for k, v in {"width": WIDTH, "depth": 1, "heads": 2, "ff_dim": 12}.items()]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose("import", overrides=words)
    return {"resampler": cfg.resampler, "cama": cfg.cama}


def networks(sizes, name="cogvideox", seed=0):
    """Resampler, adapter and CAMA with random weights."""
    torch.manual_seed(seed)
    resampler, cama = instantiate(sizes["resampler"]), instantiate(sizes["cama"])
    adapter = MotionAdapter({s: (w, 1) for s, w in SITES[name].items()}, WIDTH, init="reference")
    return {"resampler": resampler, "motion_adapter": adapter, "cama": cama}


def reference_files(nets, name, dtype=torch.bfloat16):
    """File -> what torch.save gets, in the layout of the published files (all of them, with everything optional)."""
    resampler, cama = nets["resampler"].state_dict(), nets["cama"].state_dict()
    proj = {k: v.to(dtype) for k, v in resampler.items()}
    adapter = {f"action_proj_model.{k}": v.to(dtype) for k, v in resampler.items()}
    for site in SITES[name]:
        for projection in ("to_k", "to_v", "to_q"):
            weight = nets["motion_adapter"].site(site).get_submodule(projection).weight
            adapter[SITE_KEYS[name].format(site, projection)] = weight.detach().to(dtype)
    transformer = {"sos_token": cama["sos"].to(dtype)}
    for key, value in cama.items():
        if key.startswith("appearance_resampler."):
            transformer[key.replace("appearance_resampler", "condition_proj")] = value.to(dtype)
        elif key.startswith("transformer."):
            transformer[key] = value.to(dtype)
    files = {
        "motion_proj.ckpt": proj,
        "Motion-Adapter.ckpt": {"state_dict": adapter},
        "motion_transformer.ckpt": {"state_dict": transformer},
    }
    if name == "cogvideox":
        files["17_frames.ckpt"] = {
            "state_dict": {
                f"transformer.{site}.{projection}.{kind}": torch.randn(shape).to(dtype)
                for site, w in SITES[name].items()
                for projection in ("to_q", "to_k", "to_v")
                for kind, shape in (("weight", (w, w)), ("bias", (w,)))
            }
        }
    return files


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for file, content in files.items():
        torch.save(content, folder / file)
    return folder


def drop(files, file, part):
    """Remove the keys that contain `part`."""
    state = files[file]["state_dict"]
    gone = [key for key in state if part in key]
    assert gone
    for key in gone:
        del state[key]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype, key
        assert torch.equal(one[key], other[key]), key


@pytest.fixture
def published(tmp_path, sizes):
    """A CogVideoX release as the published one: neither start tokens nor anything of Lightning's but state_dict."""
    files = reference_files(networks(sizes), "cogvideox")
    drop(files, "motion_transformer.ckpt", "sos_token")
    return write(tmp_path / "CogVideoX", files)


def trained(folder, sizes, name="cogvideox", change=lambda state: None, nets=None):
    """Weights as `motionrag train` leaves them; `change` gets all of them before they are written."""
    nets = nets or networks(sizes, name)
    state = {f"{part}.{k}": v for part, net in nets.items() for k, v in net.state_dict().items()}
    change(state)
    about = {"sizes": OmegaConf.to_container(OmegaConf.create(sizes), resolve=True)}
    for stage, prefixes in {"adapter": ("resampler", "motion_adapter"), "cama": ("cama",)}.items():
        part = {k: v for k, v in state.items() if k.split(".")[0] in prefixes}
        save_weights(folder / f"{stage}.safetensors", part, about)
    return folder


def do_import(path, out, sizes, name="cogvideox"):
    return import_release(name, path, out, sizes, SITES[name])


# ---------------------------------------------------------------- there and back


@pytest.mark.parametrize("name", RELEASES)
@pytest.mark.parametrize(
    "without",
    [(), ("sos_token",), ("action_proj_model.", "sos_token"), ("to_q_a", "sos_token")],
    ids=["everything", "as-published", "no-resampler", "no-queries"],
)
def test_export_of_an_import_is_the_same_files(tmp_path, sizes, name, without):
    if "to_q_a" in without and name != "dynamicrafter":
        pytest.skip("only DynamiCrafter's files lack them")
    files = reference_files(networks(sizes, name), name)
    for part in without:
        drop(files, "motion_transformer.ckpt" if part == "sos_token" else "Motion-Adapter.ckpt", part)
    report = do_import(write(tmp_path / "theirs", files), tmp_path / "ours", sizes, name)
    assert set(report["files"]) == set(files) and report["missing"] == []
    assert ("cama.sos" in report["filled"]) == ("sos_token" in without)
    assert sum(".to_q." in key for key in report["filled"]) == 2 * ("to_q_a" in without)
    export_release(name, tmp_path / "ours", tmp_path / "back")
    assert {path.name for path in (tmp_path / "back").iterdir()} == set(files)
    for file, content in files.items():
        back = torch.load(tmp_path / "back" / file, weights_only=True)
        if file == "motion_proj.ckpt":
            assert_same(back, content)
        else:
            assert back.keys() == {"state_dict"}
            assert_same(back["state_dict"], content["state_dict"])


@pytest.mark.parametrize("name", RELEASES)
def test_import_of_an_export_is_the_same_weights(tmp_path, sizes, name):
    """Weights of one's own training: float32, learned start tokens and queries, no record of an import."""
    trained(tmp_path / "ours", sizes, name)
    report = export_release(name, tmp_path / "ours", tmp_path / "theirs")
    assert set(report["files"]) == {"Motion-Adapter.ckpt", "motion_proj.ckpt", "motion_transformer.ckpt"}
    back = do_import(tmp_path / "theirs", tmp_path / "again", sizes, name)
    assert back["filled"] == [] and back["absent"] == {}
    for stage in ("adapter", "cama"):
        file = f"{stage}.safetensors"
        assert_same(read_weights(tmp_path / "again" / file)[0], read_weights(tmp_path / "ours" / file)[0])


def test_an_imported_folder_survives_the_way_there_and_back(tmp_path, sizes, published):
    do_import(published, tmp_path / "a", sizes)
    export_release("cogvideox", tmp_path / "a", tmp_path / "theirs")
    do_import(tmp_path / "theirs", tmp_path / "b", sizes)
    for stage in ("adapter", "cama", "backbone"):
        for file in (f"{stage}.safetensors", f"{stage}.json"):
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_weights_trained_further_keep_their_start_tokens(tmp_path, sizes, published):
    do_import(published, tmp_path / "ours", sizes)
    state, manifest = read_weights(tmp_path / "ours" / "cama.safetensors")
    state["cama.sos"] = state["cama.sos"] + 1
    save_weights(tmp_path / "ours" / "cama.safetensors", state, {"sizes": manifest["about"]["sizes"]})
    export_release("cogvideox", tmp_path / "ours", tmp_path / "theirs")
    content = torch.load(tmp_path / "theirs" / "motion_transformer.ckpt", weights_only=True)
    assert torch.equal(content["state_dict"]["sos_token"], state["cama.sos"])


# ---------------------------------------------------------------- what the weights then compute


def test_imported_weights_compute_what_the_published_ones_do(tmp_path, sizes, published):
    """Resampler, CAMA and adapter on the tiny CogVideoX, all three filled from the imported folder."""
    source = networks(sizes)
    imported = networks(sizes, seed=1)
    do_import(published, tmp_path / "ours", sizes)
    load_weights(
        tmp_path / "ours" / "adapter.safetensors",
        resampler=imported["resampler"],
        motion_adapter=imported["motion_adapter"],
    )
    load_weights(tmp_path / "ours" / "cama.safetensors", cama=imported["cama"])
    for net in source.values():
        for parameter in net.parameters():
            parameter.data = parameter.data.bfloat16().float()  # what the files hold
    source["cama"].sos.data.copy_(imported["cama"].sos)  # not in the files

    backbone = CogVideoX.tiny(text=str, num_layers=2)
    motion, appearance = torch.randn(1, 2, 4, 6), torch.randn(1, 3, 4, 5)
    latents, image, text = torch.randn(1, 5, 16, 8, 8), torch.randn(1, 1, 16, 8, 8), torch.randn(1, 24, 384)

    def run(nets):
        tokens = nets["resampler"](motion.flatten(0, 1)).unflatten(0, (1, 2))
        tokens = nets["cama"].predict(tokens, appearance[:, :2], appearance[:, 2])
        adapter = nets["motion_adapter"]
        adapter.attach(backbone.adapter_sites())
        with torch.no_grad(), adapter.use(tokens):
            velocity = backbone.predict(latents, image, text, torch.tensor([500]))
        adapter.detach()
        return velocity

    with torch.no_grad():
        bare = backbone.predict(latents, image, text, torch.tensor([500]))
    expected, found = run(source), run(imported)
    assert torch.equal(found, expected)
    assert (found - bare).abs().max() > 1e-4


TINY = {
    "cogvideox": lambda: CogVideoX.tiny(text=lambda texts: torch.randn(len(texts), 24, 384), num_layers=2),
    "svd": SVD.tiny,
    "dynamicrafter": lambda: DynamiCrafter.tiny(text=lambda texts: torch.randn(len(texts), 24, 384)),
}


@pytest.mark.parametrize("name", RELEASES)
def test_a_tiny_backbone_makes_the_same_video_after_there_and_back(tmp_path, sizes, name):
    """Its own sites, in the release's format and out of it again."""
    backbone = TINY[name]()
    sites = backbone.adapter_sites()
    nets = networks(sizes)
    nets["motion_adapter"] = MotionAdapter.for_modules(sites, WIDTH, init="reference")
    trained(tmp_path / "ours", sizes, nets=nets)
    export_release(name, tmp_path / "ours", tmp_path / "theirs")
    widths = {site: module.to_out[0].in_features for site, module in sites.items()}
    import_release(name, tmp_path / "theirs", tmp_path / "again", sizes, widths)
    back = networks(sizes, seed=1) | {"motion_adapter": MotionAdapter.for_modules(sites, WIDTH)}
    load_weights(
        tmp_path / "again" / "adapter.safetensors",
        resampler=back["resampler"],
        motion_adapter=back["motion_adapter"],
    )

    image, features = torch.randn(1, 3, 32, 32).clamp(-1, 1), torch.randn(1, 4, 6)
    with torch.no_grad():
        contexts = backbone.encode_context(["a ball"], image), backbone.null_context(image)

        def sample(nets, scale=1.0):
            adapter = nets["motion_adapter"].attach(sites)
            tokens = nets["resampler"](features)
            motion = MotionInput(adapter, tokens, torch.zeros_like(tokens), scale)
            video = backbone.sample(image, *contexts, steps=2, guidance=2.0, seeds=[0], motion=motion)
            adapter.detach()
            return video

        expected = sample(nets)
        assert torch.equal(sample(back), expected)
        assert (sample(back, 0.0) - expected).abs().max() > 1e-4


def test_what_is_filled_is_always_the_same(tmp_path, sizes, published):
    do_import(published, tmp_path / "a", sizes)
    torch.manual_seed(7)
    do_import(published, tmp_path / "b", sizes)
    a, b = (read_weights(tmp_path / x / "cama.safetensors")[0]["cama.sos"] for x in "ab")
    assert torch.equal(a, b) and a.dtype == torch.bfloat16
    assert a.float().std() == pytest.approx(WIDTH**-0.5, rel=0.2)

    files = reference_files(networks(sizes, "dynamicrafter"), "dynamicrafter")
    drop(files, "Motion-Adapter.ckpt", "to_q_a")
    write(tmp_path / "dc", files)
    report = do_import(tmp_path / "dc", tmp_path / "c", sizes, "dynamicrafter")
    site = "motion_adapter.input_blocks/1/1/transformer_blocks/0/attn2.to_q.weight"
    query = read_weights(tmp_path / "c" / "adapter.safetensors")[0][site].float()
    assert site in report["filled"] and query.abs().max() <= 8**-0.5 and query.std() > 0.15


def test_the_17_frame_fine_tune_enters_the_backbone(tmp_path, sizes, published):
    do_import(published, tmp_path / "ours", sizes)
    plain = CogVideoX.tiny(text=str, num_layers=2)
    for name, part in (("vae", plain.vae), ("transformer", plain.denoiser), ("scheduler", plain.scheduler)):
        part.save_pretrained(tmp_path / "backbone" / name)
    options = {"path": str(tmp_path / "backbone"), "text": str, "frames": 9}
    tuned = load_cogvideox(finetune=str(tmp_path / "ours" / "backbone.safetensors"), **options)
    wanted = torch.load(published / "17_frames.ckpt", weights_only=True)["state_dict"]
    before = dict(plain.denoiser.named_parameters())
    for key, value in tuned.denoiser.named_parameters():
        expected = wanted.get(f"transformer.{key}", before[key]).float()
        assert torch.equal(value, expected), key

    smaller = CogVideoX.tiny(text=str, num_layers=1).denoiser
    before = {k: v.clone() for k, v in smaller.state_dict().items()}
    with pytest.raises(
        MotionRAGError, match=r"transformer_blocks.1.attn1.to_. is|transformer_blocks.1.*no such"
    ):
        load_finetune(smaller, tmp_path / "ours" / "backbone.safetensors")
    assert_same(smaller.state_dict(), before)


def test_files_that_may_be_missing(tmp_path, sizes, published):
    (published / "motion_proj.ckpt").unlink()
    (published / "17_frames.ckpt").unlink()
    report = do_import(published, tmp_path / "ours", sizes)
    assert report["missing"] == ["motion_proj.ckpt", "17_frames.ckpt"]
    assert not (tmp_path / "ours" / "backbone.safetensors").exists()
    assert "load_cogvideox" not in (tmp_path / "ours" / "release" / "cogvideox.yaml").read_text()
    export_release("cogvideox", tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "motion_proj.ckpt").is_file()  # the reference needs it


def test_tensors_that_share_memory(tmp_path, sizes, published):
    """As trainers that flatten their parameters save them."""
    content = torch.load(published / "motion_transformer.ckpt", weights_only=True)["state_dict"]
    flat = torch.cat([value.flatten() for value in content.values()])
    views = dict(zip(content, flat.split([v.numel() for v in content.values()]), strict=True))
    views = {key: view.view(content[key].shape) for key, view in views.items()}
    write(published, {"motion_transformer.ckpt": {"state_dict": views, "epoch": 3, "optimizer_states": []}})
    do_import(published, tmp_path / "ours", sizes)
    found, _ = read_weights(tmp_path / "ours" / "cama.safetensors")
    assert torch.equal(
        found["cama.transformer.layers.0.linear1.weight"], content["transformer.layers.0.linear1.weight"]
    )
    assert (tmp_path / "ours" / "cama.safetensors").stat().st_size < 2 * flat.nbytes + 20_000


# ---------------------------------------------------------------- mistakes


class Code:
    """Runs when a careless reader unpickles it."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.mkdir, (self.flag,)


def refuse(tmp_path, sizes, path, match, name="cogvideox"):
    """The import fails with one line and leaves nothing behind."""
    before = set(tmp_path.iterdir())
    with pytest.raises(MotionRAGError, match=match) as caught:
        do_import(path, tmp_path / "ours", sizes, name)
    assert "\n" not in str(caught.value)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "file", ["Motion-Adapter.ckpt", "motion_proj.ckpt", "motion_transformer.ckpt", "17_frames.ckpt"]
)
def test_a_pickle_with_code_inside(tmp_path, sizes, published, file):
    content = torch.load(published / file, weights_only=True)
    torch.save({**content, "callbacks": Code(tmp_path / "ran")}, published / file)
    refuse(
        tmp_path, sizes, published, rf"{file} holds posix.mkdir: expected tensors only; nothing was loaded"
    )
    assert not (tmp_path / "ran").exists()


def test_any_damage_is_one_line(tmp_path, sizes, published):
    """Bytes of the pickle itself changed: the file is refused, or the damage did not reach what is read."""
    path = published / "motion_transformer.ckpt"
    data = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(data)
        damaged[rng.randrange(600)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            _read_checkpoint(path)
        except MotionRAGError:
            refused += 1
    assert refused > 10


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "short"])
def test_a_damaged_file(tmp_path, sizes, published, damage):
    path = published / "motion_transformer.ckpt"
    data = path.read_bytes()
    made = {
        "cut": data[: len(data) // 2],
        "empty": b"",
        "text": b"version https://git-lfs",
        "short": b"\x80\x02}q",
    }
    path.write_bytes(made[damage])
    refuse(
        tmp_path, sizes, published, "motion_transformer.ckpt is not a whole checkpoint .damaged or cut off"
    )


FORMATS = [dict(_use_new_zipfile_serialization=False), dict(pickle_protocol=4), dict(pickle_protocol=5)]


@pytest.mark.parametrize("options", FORMATS, ids=["legacy", "protocol-4", "protocol-5"])
def test_other_formats_are_told_from_damage_and_from_code(tmp_path, sizes, published, options):
    path = published / "motion_transformer.ckpt"
    content = torch.load(path, weights_only=True)
    torch.save(content, path, **options)
    refuse(tmp_path, sizes, published, "is pickled in another way than torch.save's default .* save it again")
    torch.save({**content, "callbacks": Code(tmp_path / "ran")}, path, **options)
    refuse(tmp_path, sizes, published, r"holds posix.mkdir: expected tensors only")
    path.write_bytes(pickle.dumps({"callbacks": Code(tmp_path / "ran")}))
    refuse(tmp_path, sizes, published, r"holds posix.mkdir: expected tensors only")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (torch.tensor(float("nan")), "holds values that are no numbers"),
        (
            torch.tensor(0.0).to(torch.float8_e4m3fn),
            "is torch.float8_e4m3fn, expected a tensor of floats of 16",
        ),
    ],
    ids=["nan", "float8"],
)
def test_values_that_are_no_weights(tmp_path, sizes, published, value, match):
    file = "motion_transformer.ckpt"
    state = torch.load(published / file, weights_only=True)["state_dict"]
    key = next(iter(state))
    state[key] = value.expand(state[key].shape).clone()
    write(published, {file: {"state_dict": state}})
    refuse(tmp_path, sizes, published, f"{file}: {key} {match}")


@pytest.mark.filterwarnings("ignore:.*[Ss]parse")
@pytest.mark.parametrize("kind", ["sparse", "without values"])
def test_tensors_that_are_not_plain(tmp_path, sizes, published, kind):
    file, key = "Motion-Adapter.ckpt", "action_proj_model.proj_in.weight"
    state = torch.load(published / file, weights_only=True)["state_dict"]
    state[key] = state[key].float().to_sparse() if kind == "sparse" else state[key].to("meta")
    write(published, {file: {"state_dict": state}})
    refuse(tmp_path, sizes, published, f"{file}: {key} is {kind}, expected a plain tensor")


def test_the_more_precise_of_two_equal_resamplers_stays(tmp_path, sizes):
    """motion_proj.ckpt in float32 beside an adapter in bfloat16: no value is lost; a real difference is still seen."""
    nets = networks(sizes)
    files = reference_files(nets, "cogvideox")
    files["motion_proj.ckpt"] = {k: v.clone() for k, v in nets["resampler"].state_dict().items()}
    do_import(write(tmp_path / "theirs", files), tmp_path / "ours", sizes)
    found = read_weights(tmp_path / "ours" / "adapter.safetensors")[0]
    for key, value in nets["resampler"].state_dict().items():
        assert torch.equal(found[f"resampler.{key}"], value)
    files["motion_proj.ckpt"]["latents"] += 0.1
    write(tmp_path / "theirs", files)
    with pytest.raises(MotionRAGError, match="hold different motion Resamplers .latents differs"):
        do_import(tmp_path / "theirs", tmp_path / "again", sizes)


def test_a_published_file_given_for_weights(published):
    with pytest.raises(
        MotionRAGError, match="Motion-Adapter.ckpt is no checkpoint of motionrag train.*motionrag import"
    ):
        read_weights(published / "Motion-Adapter.ckpt")


def test_contents_that_are_no_tensors(tmp_path, sizes, published):
    for content, match in (
        ([1, 2], "holds no tensors by name"),
        ({"state_dict": {}}, "holds no tensors by name"),
        ({"state_dict": {"sos_token": 3}}, "sos_token is int, expected a tensor of floats of 16"),
        (
            {"state_dict": {"sos_token": torch.zeros(3, dtype=torch.int8)}},
            "sos_token is torch.int8, expected a tensor",
        ),
    ):
        write(published, {"motion_transformer.ckpt": content})
        refuse(tmp_path, sizes, published, match)


def test_keys_and_shapes_that_differ(tmp_path, sizes, published):
    file, site = "Motion-Adapter.ckpt", "transformer.transformer_blocks.1.attn1.processor.to_k_ip.0.weight"
    good = torch.load(published / file, weights_only=True)["state_dict"]

    def change(**new):
        state = {k: v for k, v in {**good, **new}.items() if v is not None}
        write(published, {file: {"state_dict": state}})

    change(**{site: None})
    refuse(
        tmp_path, sizes, published, rf"{file}: {site} \[160, 16\] is missing \(1 keys missing, 0 unexpected\)"
    )
    change(extra=torch.zeros(2, 3))
    refuse(
        tmp_path, sizes, published, rf"{file}: extra \[2, 3\] is unexpected \(0 keys missing, 1 unexpected\)"
    )
    change(**{site: torch.zeros(160, 24)})
    refuse(tmp_path, sizes, published, rf"{file}: {site} is \[160, 24\], expected \[160, 16\] for cogvideox")
    change(**{"action_proj_model.latents": None})  # optional as a whole only
    refuse(tmp_path, sizes, published, rf"{file}: action_proj_model.latents \[1, 3, 8\] is missing")
    change()
    with pytest.raises(
        MotionRAGError, match=r"to_k_ip.0.weight is \[160, 16\], expected \[3072, 16\]|is missing"
    ):
        import_release("cogvideox", published, tmp_path / "ours", sizes)  # the published sites
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize("name", ["svd", "dynamicrafter"])
def test_a_checkpoint_of_another_backbone(tmp_path, sizes, published, name):
    match = r"is a checkpoint of cogvideox \(transformer.transformer_blocks.0.attn1.*is \[160, .*give release=cogvideox"
    refuse(tmp_path, sizes, published, match, name)
    write(tmp_path / "other", reference_files(networks(sizes, name), name))
    refuse(tmp_path, sizes, tmp_path / "other", f"is a checkpoint of {name} .* expected one of cogvideox")


def test_motion_resamplers_of_two_trainings(tmp_path, sizes, published):
    other = networks(sizes, seed=3)["resampler"].bfloat16().state_dict()
    write(published, {"motion_proj.ckpt": other})
    refuse(tmp_path, sizes, published, "hold different motion Resamplers .latents differs")


def test_no_motion_resampler_at_all(tmp_path, sizes):
    files = reference_files(networks(sizes), "cogvideox")
    drop(files, "Motion-Adapter.ckpt", "action_proj_model.")
    del files["motion_proj.ckpt"]
    refuse(
        tmp_path,
        sizes,
        write(tmp_path / "theirs", files),
        "holds no motion Resampler: expected motion_proj.ckpt",
    )


def test_places(tmp_path, sizes, published):
    refuse(tmp_path, sizes, tmp_path, r"has no Motion-Adapter.ckpt: .*; there is .*/CogVideoX$")
    refuse(tmp_path, sizes, tmp_path / "none", "has no Motion-Adapter.ckpt")
    with pytest.raises(MotionRAGError, match="release=wan: expected one of cogvideox, svd, dynamicrafter"):
        import_release("wan", published, tmp_path / "ours", sizes)
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("keep")
    refuse(tmp_path, sizes, published, "ours is there already")
    with pytest.raises(MotionRAGError, match="ours is there already"):
        export_release("cogvideox", published, tmp_path / "ours")
    assert (tmp_path / "ours" / "mine.txt").read_text() == "keep"
    shutil.rmtree(tmp_path / "ours")
    (tmp_path / "ours").mkdir()
    do_import(published, tmp_path / "ours", sizes)  # an empty folder is as good as none


def test_nothing_is_half_written(tmp_path, sizes, published, monkeypatch):
    save, calls = save_weights, []

    def failing(path, state, about):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return save(path, state, about)

    monkeypatch.setattr(release_module, "save_weights", failing)
    with pytest.raises(KeyboardInterrupt):
        do_import(published, tmp_path / "ours", sizes)
    assert len(calls) == 2 and {path.name for path in tmp_path.iterdir()} == {"CogVideoX"}


def test_no_room(tmp_path, sizes, published, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10))
    refuse(tmp_path, sizes, published, "ours needs 0.0 GB, 0.0 GB are free there")


def test_exports_that_cannot_be(tmp_path, sizes, published):
    do_import(published, tmp_path / "ours", sizes)
    with pytest.raises(MotionRAGError, match="svd has no adapter site transformer_blocks.0.attn1"):
        export_release("svd", tmp_path / "ours", tmp_path / "back")
    with pytest.raises(MotionRAGError, match="no weights file"):
        export_release("cogvideox", tmp_path / "CogVideoX", tmp_path / "back")
    save_weights(
        tmp_path / "hidden/adapter.safetensors",
        {"resampler.x": torch.zeros(1)},
        {"adapter_query": ["hidden"]},
    )
    with pytest.raises(MotionRAGError, match="adapter_query=hidden, the reference only has output: train"):
        export_release("svd", tmp_path / "hidden", tmp_path / "back")
    save_weights(
        tmp_path / "some/adapter.safetensors", {"resampler.x": torch.zeros(1)}, {"adapter_only": ".*0.*"}
    )
    with pytest.raises(MotionRAGError, match=r"adapters at the layers \.\*0\.\* alone, the reference at all"):
        export_release("cogvideox", tmp_path / "some", tmp_path / "back")
    save_weights(tmp_path / "ours" / "cama.safetensors", {"cama.sos": torch.zeros(1)})
    with pytest.raises(MotionRAGError, match="cama.json does not say the sizes of cama: copy it"):
        export_release("cogvideox", tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def set_to(key, value):
    return lambda state: state.update({key: value})


def leave_out(start):
    def change(state):
        for key in [key for key in state if key.startswith(start)]:
            del state[key]

    return change


SITE = "motion_adapter.transformer_blocks/1/attn1"


@pytest.mark.parametrize(
    "change, match",
    [
        (leave_out("cama.sos"), r"1 missing: cama.sos \(1, 3, 16\)"),
        (leave_out("resampler.latents"), "1 missing: resampler.latents"),
        (leave_out(f"{SITE}.to_k"), r"1 missing: .*/1/attn1.to_k.weight \(160, 16\)"),
        (leave_out("motion_adapter."), "holds no motion_adapter weights"),
        (set_to(f"{SITE}.to_k.weight", torch.zeros(160, 17)), r"to_k.weight \(160, 17\) instead of \(160, 16\)"),
        (set_to(f"{SITE}.to_z.weight", torch.zeros(160, 16)), "1 unexpected: .*to_z.weight"),
        (set_to("motion_adapter.x", torch.zeros(1)), "cogvideox has no adapter site x"),
        (set_to("cama.odd", torch.zeros(())), "1 unexpected: cama.odd"),
    ],
    ids=["sos", "latents", "to_k", "adapter", "width", "to_z", "x", "odd"],
)  # fmt: skip
def test_weights_that_are_not_whole_are_not_exported(tmp_path, sizes, change, match):
    trained(tmp_path / "ours", sizes, change=change)
    with pytest.raises(MotionRAGError, match=match) as caught:
        export_release("cogvideox", tmp_path / "ours", tmp_path / "back")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_an_adapter_of_the_published_width_needs_all_published_sites(tmp_path, sizes):
    """A layer that is gone as a whole: that of another size cannot be told from a smaller backbone."""
    release = RELEASES["svd"]
    site = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    adapter = MotionAdapter({site: (release.sites[site], 1)}, WIDTH)

    def change(state):
        leave_out("motion_adapter.")(state)
        state |= {f"motion_adapter.{key}": value for key, value in adapter.state_dict().items()}

    trained(tmp_path / "ours", sizes, "svd", change)
    with pytest.raises(MotionRAGError, match=r"45 missing: motion_adapter.down_blocks/0/attentions/1/"):
        export_release("svd", tmp_path / "ours", tmp_path / "back")


def test_a_fine_tune_that_is_not_whole_is_not_exported(tmp_path, sizes, published):
    do_import(published, tmp_path / "ours", sizes)
    file = tmp_path / "ours" / "backbone.safetensors"
    state = read_weights(file)[0]
    save_weights(file, {k: v for k, v in state.items() if not k.endswith("1.attn1.to_q.bias")})
    with pytest.raises(MotionRAGError, match="1 missing: backbone.transformer_blocks.1.attn1.to_q.bias"):
        export_release("cogvideox", tmp_path / "ours", tmp_path / "back")


# ---------------------------------------------------------------- the config beside the weights


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
@pytest.mark.parametrize("name", RELEASES)
def test_the_config_fits_generate_and_evaluate(tmp_path, sizes, name, verb):
    do_import(
        write(tmp_path / "theirs", reference_files(networks(sizes, name), name)),
        tmp_path / "o u",
        sizes,
        name,
    )
    words = [f"hydra.searchpath=['file://{tmp_path}/o u']", f"+release={name}"]
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_dir())):
        cfg = compose(verb, overrides=words)
        assert compose(verb, overrides=[*words, f"backbone={name}_tiny"]).backbone != cfg.backbone
    assert cfg.backbone.name == name and cfg.resampler == sizes["resampler"] and cfg.cama == sizes["cama"]
    assert cfg.encoders.motion.path == "MCG-NJU/videomae-base-finetuned-ssv2"
    assert (cfg.steps, cfg.guidance) == {"dynamicrafter": (30, 2.0)}.get(name, (25, 3.0))
    assert instantiate(cfg.motion_adapter).keywords["query"] == "output"
    for part, keys in (("adapter", ("resampler", "motion_adapter")), ("cama", ("cama",))):
        state, manifest = read_weights(cfg.weights[part])
        assert {key.split(".")[0] for key in state} == set(keys)
        assert manifest["about"]["sizes"].keys() == set(keys) - {"motion_adapter"}
    tuned = cfg.backbone.get("finetune")
    assert tuned == (f"{tmp_path}/o u/backbone.safetensors" if name == "cogvideox" else None)
