"""A package attached to pipelines of diffusers and to a backbone: same videos as our own sampling, nothing left behind."""

import re
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from diffusers import CogVideoXImageToVideoPipeline, StableVideoDiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from peft import LoraConfig
from PIL import Image
from torch import nn
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from motionrag.backbones.cogvideox import CogVideoX
from motionrag.backbones.dynamicrafter import DynamiCrafter
from motionrag.backbones.svd import SVD
from motionrag.checkpoint import read_weights, resolve, save_weights
from motionrag.cli.train import make_motionworld
from motionrag.data.video import read_clip, write_mp4
from motionrag.encoders import AppearanceEncoder, CaptionEncoder, MotionEncoder
from motionrag.errors import MotionRAGError
from motionrag.generate import MotionRAG, to_float
from motionrag.io import write_json
from motionrag.modules.cama import CAMA
from motionrag.modules.motion_adapter import MotionAdapter
from motionrag.modules.resampler import Resampler
from motionrag.plugin import MotionPackage
from motionrag.release import ENCODERS, export_release, import_release
from motionrag.retrieval.database import RetrievalDatabase
from motionrag.retrieval.retrievers import TextRetriever

ROOT = Path(__file__).resolve().parents[1]
DOC, README = ((ROOT / page).read_text(encoding="utf-8") for page in ("docs/plugin.md", "README.md"))
PYTHON = r"^```python\n(.*?)^```"
TINY = resolve("pkg:tiny/adapter.safetensors").parent
ATOL = 1e-4  # of pixels in [0, 1]


def text(prompts):
    """Text states that depend on the prompt alone, in place of a text encoder."""
    return torch.stack(
        [torch.randn(24, 384, generator=torch.Generator().manual_seed(len(p))) for p in prompts]
    )


def cogvideox():
    return CogVideoX.load("pkg:tiny", text=text, frames=9)


def thin():
    return CogVideoX.tiny(text=text, num_layers=2)


BACKBONES = {
    "cogvideox": cogvideox,
    "svd": SVD.tiny,
    "dynamicrafter": lambda: DynamiCrafter.tiny(text=text),
}


def pipeline(backbone):
    """The diffusers pipeline around a tiny backbone's networks; DynamiCrafter is its own."""
    if isinstance(backbone, CogVideoX):
        pipe = CogVideoXImageToVideoPipeline(None, None, backbone.vae, backbone.denoiser, backbone.scheduler)
    elif isinstance(backbone, SVD):
        pipe = StableVideoDiffusionPipeline(
            backbone.vae, backbone.image_encoder, backbone.denoiser, backbone.scheduler, CLIPImageProcessorPil()
        )  # fmt: skip
    else:
        return backbone
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """Backbone -> folder of a package: the one that ships, random ones for the others ("other": for CogVideoX, "thin":
    for one with fewer layers, "some": for CogVideoX, at one layer)."""
    folders = {"cogvideox": TINY}
    sizes = read_weights(TINY / "cama.safetensors")[1]["about"]["sizes"]
    encoders = read_weights(TINY / "cama.safetensors")[1]["about"]["encoders"]
    for seed, (name, make) in enumerate(
        {**BACKBONES, "other": cogvideox, "thin": thin, "some": cogvideox}.items()
    ):
        if name in folders:
            continue
        backbone, folder = make(), tmp_path_factory.mktemp(name)
        torch.manual_seed(seed)
        resampler, cama = new_networks(sizes)
        only = ".*blocks.1.*" if name == "some" else None
        adapter = MotionAdapter.for_modules(backbone.adapter_sites(), 128, init="reference", only=only)
        state = {f"resampler.{k}": v for k, v in resampler.state_dict().items()}
        state |= {f"motion_adapter.{k}": v for k, v in adapter.state_dict().items()}
        about = {"backbone": backbone.name, "sizes": sizes, "encoders": encoders}
        about |= {"adapter_query": [backbone.adapter_query], "adapter_only": only}
        save_weights(folder / "adapter.safetensors", state, about)
        state = {f"cama.{k}": v for k, v in cama.state_dict().items()}
        save_weights(folder / "cama.safetensors", state, about)
        folders[name] = folder
    return folders


def new_networks(sizes):
    sizes = {
        part: {k: v for k, v in sizes[part].items() if k != "_target_"} for part in ("resampler", "cama")
    }
    sizes["cama"].pop("appearance_resampler")  # the same sizes as the motion Resampler's
    return Resampler(**sizes["resampler"]), CAMA(Resampler(**sizes["resampler"]), **sizes["cama"])


@pytest.fixture(scope="module")
def pictures():
    """Two first frames."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


@pytest.fixture(scope="module")
def clips():
    """Two reference clips, uint8, of different lengths and sizes."""
    random = np.random.default_rng(1)
    return [random.integers(0, 256, size, dtype=np.uint8) for size in ((9, 32, 32, 3), (12, 40, 48, 3))]


def as_tensor(pictures):
    return torch.cat([to_float(np.array(picture))[None] for picture in pictures])


@pytest.fixture
def exact(monkeypatch):
    """CogVideoX's pipeline draws the condition latents, our sampling takes their mode."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())


def run(pipe, pictures, guidance=2.0, steps=2, **options):
    """A video (B, T, 3, H, W) in [0, 1] of a pipeline's own call."""
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)][: len(pictures)]
    if isinstance(pipe, CogVideoXImageToVideoPipeline):
        contexts = {"prompt_embeds": text(["a ball"] * len(pictures)).to(pipe.transformer.dtype)}
        contexts["negative_prompt_embeds"] = text([""] * len(pictures)).to(pipe.transformer.dtype)
        options |= {"guidance_scale": guidance, **contexts}
    elif isinstance(pipe, StableVideoDiffusionPipeline):
        options |= {"max_guidance_scale": guidance, "height": 32, "width": 32}
    else:
        image = as_tensor(pictures)
        options |= {"steps": steps, "guidance": guidance, "seeds": [3, 4][: len(pictures)]}
        return pipe(image, "a ball", **options) / 2 + 0.5
    options |= {"num_inference_steps": steps, "num_frames": 9, "output_type": "pt"}
    return pipe(pictures, generator=generators, **options).frames


@pytest.fixture(scope="module", params=BACKBONES)
def name(request):
    return request.param


@pytest.fixture
def pipe(name):
    return pipeline(BACKBONES[name]())


@pytest.fixture
def cog():
    return pipeline(cogvideox())


@pytest.fixture
def motion(packages, name, pipe):
    """The package, attached to the pipeline of the same backbone."""
    motion = MotionPackage.load(packages[name]).attach(pipe)
    yield motion
    motion.detach()


@lru_cache(maxsize=3)
def generator(name, folder):
    """What generate would make its videos with."""
    about = read_weights(folder / "cama.safetensors")[1]["about"]
    backbone = BACKBONES[name]()
    resampler, cama = new_networks(about["sizes"])
    return MotionRAG(
        backbone,
        MotionEncoder("pkg:tiny/videomae", size=32),
        AppearanceEncoder("pkg:tiny/dinov2", size=32),
        resampler,
        lambda sites, token_width: MotionAdapter.for_modules(
            sites, token_width, query=backbone.adapter_query
        ),
        cama,
        str(folder / "adapter.safetensors"),
        str(folder / "cama.safetensors"),
    )


def ours(name, folder, pictures, clips, **options):
    """The video that generate's networks make."""
    model = generator(name, folder)
    image = as_tensor(pictures)
    features = model.encode_references([to_float(clip) for clip in clips])
    tokens = model.adapt(*(f.expand(len(image), *f.shape[1:]) for f in features), image)
    options = {"steps": 2, "guidance": 2.0, "seeds": [3, 4][: len(pictures)], **options}
    return model.generate(image, ["a ball"] * len(pictures), tokens, **options) / 2 + 0.5


# ---------------------------------------------------------------- the same videos


@pytest.mark.parametrize("guidance", [2.0, 1.0])
def test_the_video_is_that_of_generate(name, pipe, motion, packages, pictures, clips, guidance, exact):
    """Two pictures at once, so that guidance and frames have rows to mix up."""
    video = run(pipe, pictures, guidance, references=clips)
    expected = ours(name, packages[name], pictures, clips, guidance=guidance)
    torch.testing.assert_close(video, expected, atol=ATOL, rtol=0)
    bare = run(pipe, pictures, guidance)
    assert (video - bare).abs().max() > 20 * ATOL
    if guidance == 1:
        return
    flipped = ours(name, packages[name], pictures, clips[::-1], guidance=guidance)
    assert (video - flipped).abs().max() > 5 * ATOL  # the order of the references counts
    half = run(pipe, pictures, guidance, references=clips, motion_scale=0.5)
    expected = ours(name, packages[name], pictures, clips, guidance=guidance, motion_scale=0.5)
    torch.testing.assert_close(half, expected, atol=ATOL, rtol=0)


def test_without_references_the_pipeline_is_bare(name, pipe, motion, pictures, clips):
    bare = run(pipeline(BACKBONES[name]()), pictures[:1])
    assert torch.equal(run(pipe, pictures[:1]), bare)
    assert torch.equal(run(pipe, pictures[:1], references=clips, motion_scale=0), bare)


def test_a_package_for_some_layers(cog, packages, pictures, clips):
    MotionPackage.load(packages["some"]).attach(cog)
    hooked = [bool(block.attn1.to_out[0]._forward_pre_hooks) for block in cog.transformer.transformer_blocks]
    assert hooked == [False, True, False, False, False]
    assert not np.allclose(run(cog, pictures, references=clips), run(cog, pictures))


def test_several_videos_of_a_picture(packages, pictures, clips):
    pipe = pipeline(SVD.tiny())
    motion = MotionPackage.load(packages["svd"]).attach(pipe)
    latents = torch.randn(1, 9, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    call = dict(height=32, width=32, num_frames=9, num_inference_steps=1, output_type="pt", references=clips)
    one, two = (
        pipe(
            pictures[0],
            num_videos_per_prompt=n,
            latents=latents.expand(n, -1, -1, -1, -1),
            generator=torch.manual_seed(3),
            **call,
        ).frames
        for n in (1, 2)
    )
    torch.testing.assert_close(two, one.expand_as(two), atol=ATOL, rtol=0)
    motion.detach()


# ---------------------------------------------------------------- nothing is left behind


def everything(pipe):
    """All that attaching could change: class, attributes, modules, their hooks, flags, tensors."""
    parts = pipe.components if hasattr(pipe, "components") else vars(pipe)
    modules = {
        f"{part}.{name}": module
        for part, network in parts.items()
        if isinstance(network, nn.Module)
        for name, module in network.named_modules()
    }
    return {
        "class": type(pipe),
        "attributes": dict(vars(pipe)),
        "modules": modules,
        "vars": {
            name: {
                key: dict(value) if isinstance(value, dict) else value for key, value in vars(module).items()
            }
            for name, module in modules.items()
        },
        "flags": {
            f"{name}.{key}": (p.requires_grad, p.dtype, p.data_ptr())
            for name, module in modules.items()
            for key, p in module.named_parameters(recurse=False)
        },
    }, {
        f"{name}.{key}": value.clone()
        for name, module in modules.items()
        for key, value in module.state_dict().items()
    }


def test_detaching_restores_the_pipeline(name, packages, pictures, clips):
    backbone = BACKBONES[name]()
    pipe = pipeline(backbone)
    expected = run(pipe, pictures[:1])
    before, state = everything(pipe)
    motion = MotionPackage.load(packages[name])
    assert motion.attach(pipe) is motion
    assert type(pipe) is not before["class"] and isinstance(pipe, before["class"])
    assert type(pipe).__name__ == before["class"].__name__
    assert [n for n, _ in backbone.denoiser.named_parameters()] == list(
        dict(before["modules"][next(k for k in before["modules"] if k.startswith(("transformer.", "unet.", "denoiser.")))].named_parameters())
    )  # fmt: skip
    run(pipe, pictures[:1], references=clips)
    attached, _ = everything(pipe)
    assert attached["vars"] != before["vars"]  # the comparison sees hooks
    motion.detach()
    after, state_after = everything(pipe)
    for attributes in (before, after):
        for volatile in ("_guidance_scale", "_num_timesteps", "_current_timestep", "_interrupt"):
            attributes["attributes"].pop(volatile, None)  # what a call leaves by itself
    assert after == before
    assert state_after.keys() == state.keys()
    assert all(torch.equal(state_after[key], value) for key, value in state.items())
    assert torch.equal(run(pipe, pictures[:1]), expected)
    with pytest.raises(TypeError, match="references"):
        run(pipe, pictures[:1], references=clips)
    motion.detach()  # nothing to do
    motion.attach(pipe).detach()


def test_a_call_that_fails_leaves_the_pipeline_bare(cog, packages, pictures, clips):
    bare = run(cog, pictures[:1])
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)

    def fail(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(cog, pictures[:1], references=clips, callback_on_step_end=fail)
    assert torch.equal(run(cog, pictures[:1]), bare)
    motion.detach()


def test_an_attached_pipeline_is_saved_bare(cog, packages, tmp_path):
    bare = {key: value.clone() for key, value in cog.transformer.state_dict().items()}
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)
    cog.transformer.save_pretrained(tmp_path / "transformer")
    cog.save_config(tmp_path)
    assert "CogVideoXImageToVideoPipeline" in (tmp_path / "model_index.json").read_text()
    saved = (
        type(cog.transformer).from_pretrained(tmp_path / "transformer", low_cpu_mem_usage=False).state_dict()
    )
    assert saved.keys() == bare.keys() and all(torch.equal(saved[k], bare[k]) for k in bare)
    motion.detach()


# ---------------------------------------------------------------- several packages


def test_two_packages_on_one_pipeline(name, packages, pictures, clips):
    """Alone each is as if the other were not there; together they do not depend on who came first."""
    make = BACKBONES[name]
    other = packages["other" if name == "cogvideox" else name]
    pipe = pipeline(make())
    a, b = MotionPackage.load(packages[name]), MotionPackage.load(other)
    a.attach(pipe)
    a_alone = run(pipe, pictures[:1], references=clips[:1])
    bare = run(pipe, pictures[:1])
    a.detach()
    b.attach(pipe)
    b_alone = run(pipe, pictures[:1], references=clips[1:])
    a.attach(pipe)
    assert torch.equal(run(pipe, pictures[:1]), bare)
    assert torch.equal(run(pipe, pictures[:1], references={a: clips[:1]}), a_alone)
    assert torch.equal(run(pipe, pictures[:1], references={b: clips[1:]}), b_alone)
    both = {a: clips[:1], b: clips[1:]}
    together = run(pipe, pictures[:1], references=both)
    muted = run(pipe, pictures[:1], references=both, motion_scale={b: 0})
    assert torch.equal(muted, a_alone)
    for one in (a_alone, b_alone, bare):
        assert (together - one).abs().max() > ATOL
    b.detach()
    assert torch.equal(run(pipe, pictures[:1], references=clips[:1]), a_alone)
    b.attach(pipe)  # now the second
    torch.testing.assert_close(run(pipe, pictures[:1], references=both), together, atol=ATOL, rtol=0)
    with pytest.raises(MotionRAGError, match="2 packages are attached: say whose references these are"):
        run(pipe, pictures[:1], references=clips)
    a.detach()
    b.detach()
    assert torch.equal(run(pipe, pictures[:1]), bare) and type(pipe) is type(pipeline(make()))


def test_two_pipelines_of_the_same_networks(cog, packages, pictures, clips):
    """Each has its package; the other's calls do not see it."""
    second = pipeline(cogvideox())
    second.transformer = cog.transformer
    bare = run(cog, pictures[:1])
    a = MotionPackage.load(packages["cogvideox"]).attach(cog)
    a_alone = run(cog, pictures[:1], references=clips)
    assert torch.equal(run(second, pictures[:1]), bare)
    b = MotionPackage.load(packages["other"]).attach(second)
    assert torch.equal(run(cog, pictures[:1], references=clips), a_alone)
    b_alone = run(second, pictures[:1], references=clips)
    a.detach()
    assert torch.equal(run(second, pictures[:1], references=clips), b_alone)
    assert (a_alone - b_alone).abs().max() > ATOL
    b.detach()
    assert torch.equal(run(second, pictures[:1]), bare)


# ---------------------------------------------------------------- references


def test_kinds_of_references(cog, packages, pictures, clips, tmp_path):
    write_mp4(tmp_path / "a.mp4", clips[0], 8)
    frames = read_clip(tmp_path / "a.mp4").frames
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)
    array, tensor = torch.from_numpy(frames), to_float(frames)
    expected = run(cog, pictures[:1], references=[frames])
    for same in (
        frames,
        array,
        tensor,
        [tensor.numpy()],
        str(tmp_path / "a.mp4"),
        tmp_path / "a.mp4",
        [tmp_path / "a.mp4"],
    ):
        assert torch.equal(run(cog, pictures[:1], references=same), expected)
    assert not torch.equal(run(cog, pictures[:1], references=frames[:, ::-1].copy()), expected)
    motion.detach()


@pytest.fixture(scope="module")
def db(tmp_path_factory):
    """A database of six clips, made by the encoders of the shipped package."""
    folder = tmp_path_factory.mktemp("world") / "made"
    sizes = {
        "motion": (MotionEncoder, "pkg:tiny/videomae"),
        "appearance": (AppearanceEncoder, "pkg:tiny/dinov2"),
    }
    encoders = {
        role: {"_target_": f"motionrag.encoders.{kind.__name__}", "path": path, "size": 32}
        for role, (kind, path) in sizes.items()
    }
    encoders["caption"] = {"_target_": "motionrag.encoders.CaptionEncoder"}
    make_motionworld(folder, 6, 1, {"known": 1.0}, encoders)
    return folder / "db"


def test_a_database_and_a_motion_prompt(cog, packages, pictures, db):
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)
    store = RetrievalDatabase(db)
    captions = [store.motion_caption(clip_id) for clip_id in (store.ids[0], store.ids[-1])]
    retriever = TextRetriever(store, CaptionEncoder())
    videos = run(cog, pictures, references=str(db), motion_prompt=captions, k=3)
    for row, caption in enumerate(captions):
        ids, _ = retriever.retrieve(caption, 3)
        features = store.motion_features(ids)[None], store.appearance_features(ids)[None]
        given = motion._model.adapt(*features, as_tensor(pictures[row : row + 1]))
        seen = []
        use = motion._model.adapter.use
        motion._model.adapter.use = lambda tokens, scale, use=use, seen=seen: (
            seen.append(tokens),
            use(tokens, scale),
        )[1]
        alone = run(cog, pictures, references=db, motion_prompt=caption, k=3)
        del motion._model.adapter.use
        torch.testing.assert_close(seen[0][2 + row], given[0], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(seen[0][row], motion._model.null_tokens[0])
        torch.testing.assert_close(videos[row], alone[row], atol=ATOL, rtol=0)
    with pytest.raises(
        MotionRAGError, match="expected motion_prompt, one text or one for each of 2 pictures, got 0"
    ):
        run(cog, pictures, references=db)
    with pytest.raises(MotionRAGError, match="k=9 is more than the database .* has: 6 clips"):
        run(cog, pictures, references=db, motion_prompt="a ball rolls")
    motion.detach()


# ---------------------------------------------------------------- with other things people do to pipelines


def test_lora_of_peft(cog, packages, pictures, clips):
    """Loaded before or after attaching, fused, unfused and unloaded with diffusers' own calls."""
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)

    def video(**options):
        return run(cog, pictures[:1], steps=1, **options)

    plain, bare = video(references=clips), video()
    torch.manual_seed(0)
    style = LoraConfig(r=2, target_modules=["to_q", "to_out.0"], init_lora_weights=False)
    cog.transformer.add_adapter(style, "style")
    styled = video(references=clips)
    motion.detach()
    styled_bare = video()
    motion.attach(cog)
    assert torch.equal(video(references=clips), styled)
    assert min((styled - other).abs().max() for other in (plain, bare, styled_bare)) > 10 * ATOL
    cog.transformer.fuse_lora()
    torch.testing.assert_close(video(references=clips), styled, atol=ATOL, rtol=0)
    cog.transformer.unfuse_lora()
    cog.transformer.unload_lora()
    torch.testing.assert_close(video(references=clips), plain, atol=ATOL, rtol=0)
    motion.detach()
    assert not any(m._forward_pre_hooks for m in cog.transformer.modules())


def test_offloading_by_accelerate(cog, packages, pictures, clips):
    """Diffusers' and accelerate's own hooks, with the CPU for the device too."""
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)
    expected = run(cog, pictures[:1], steps=1, references=clips)
    cog.enable_model_cpu_offload(device="cpu")
    assert hasattr(cog.transformer, "_hf_hook")
    assert torch.equal(run(cog, pictures[:1], steps=1, references=clips), expected)
    motion.detach()
    motion.attach(cog)
    assert torch.equal(run(cog, pictures[:1], steps=1, references=clips), expected)
    motion.detach()


class Lora(nn.Module):
    """A layer around a linear one, with the attributes that PEFT's has, for any network."""

    def __init__(self, base: nn.Linear):
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        generator = torch.Generator().manual_seed(0)
        self.a = nn.Parameter(0.1 * torch.randn(4, base.in_features, generator=generator))
        self.b = nn.Parameter(0.1 * torch.randn(base.out_features, 4, generator=generator))

    def forward(self, x):
        return self.base_layer(x) + x @ self.a.T @ self.b.T


def wrap(sites):
    for site in sites.values():
        site.to_out[0] = Lora(site.to_out[0])


def unwrap(sites):
    for site in sites.values():
        site.to_out[0] = site.to_out[0].base_layer


@pytest.mark.parametrize("name", ["cogvideox", "svd"], scope="function")
def test_layers_that_lora_wraps(name, packages, pictures, clips):
    """Loaded before or after attaching, the motion goes through LoRA's branch too; unloading loses nothing."""
    backbone = BACKBONES[name]()
    pipe, sites = pipeline(backbone), backbone.adapter_sites()
    motion = MotionPackage.load(packages[name])
    motion.attach(pipe)
    plain = run(pipe, pictures[:1], references=clips)
    wrap(sites)
    after = run(pipe, pictures[:1], references=clips)
    bare = run(pipe, pictures[:1])
    motion.detach()
    motion.attach(pipe)
    before = run(pipe, pictures[:1], references=clips)
    assert torch.equal(before, after)
    assert min((after - plain).abs().max(), (after - bare).abs().max()) > ATOL
    unwrap(sites)
    assert torch.equal(run(pipe, pictures[:1], references=clips), plain)
    motion.detach()
    assert not any(m._forward_pre_hooks for m in backbone.denoiser.modules())


@pytest.mark.parametrize(
    ("name", "network", "in_place"),
    [("thin", "transformer", False), ("thin", "transformer", True), ("svd", "unet", True)],
)
def test_a_compiled_denoiser(packages, pictures, clips, name, network, in_place):
    pipe = pipeline({**BACKBONES, "thin": thin}[name]())
    bare = run(pipe, pictures[:1], steps=1)
    motion = MotionPackage.load(packages[name]).attach(pipe)
    expected = run(pipe, pictures[:1], steps=1, references=clips)
    assert (expected - bare).abs().max() > 10 * ATOL
    motion.detach()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    if in_place:
        getattr(pipe, network).compile(backend=backend)
    else:
        setattr(pipe, network, torch.compile(getattr(pipe, network), backend=backend))
    torch.testing.assert_close(run(pipe, pictures[:1], steps=1), bare, atol=ATOL, rtol=0)
    assert graphs
    motion.attach(pipe)
    torch.testing.assert_close(
        run(pipe, pictures[:1], steps=1, references=clips), expected, atol=ATOL, rtol=0
    )
    motion.detach()
    torch.testing.assert_close(run(pipe, pictures[:1], steps=1), bare, atol=ATOL, rtol=0)
    torch.compiler.reset()


def test_group_offload_to_disk(cog, packages, pictures, clips, tmp_path):
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)
    expected = run(cog, pictures[:1], references=clips)
    cog.transformer.enable_group_offload(
        torch.device("cpu"), torch.device("cpu"), "leaf_level", offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors"))
    assert torch.equal(run(cog, pictures[:1], references=clips), expected)
    motion.detach()
    motion.attach(cog)  # the weights are away
    assert torch.equal(run(cog, pictures[:1], references=clips), expected)
    motion.detach()


class AwayHook:
    """Stand-in for accelerate's offload hook: around `forward`, weights are on `meta` except while it runs."""

    execution_device = "cpu"

    def __init__(self, network):
        self.kept = [(m, dict(m._parameters)) for m in network.modules()]
        self.forward, network._hf_hook = network.forward, self
        network.forward = self
        self.away()

    def away(self):
        for module, parameters in self.kept:
            for name, parameter in parameters.items():
                module._parameters[name] = None if parameter is None else nn.Parameter(parameter.to("meta"))

    def __call__(self, *args, **kwargs):
        for module, parameters in self.kept:
            module._parameters.update(parameters)
        try:
            return self.forward(*args, **kwargs)
        finally:
            self.away()


@pytest.mark.parametrize("name", ["cogvideox", "svd"], scope="function")
def test_the_adapter_follows_the_execution_device(name, packages, pictures, clips):
    """Not the weights, which offloading hooks take away between uses."""
    pipe = pipeline(BACKBONES[name]())
    motion = MotionPackage.load(packages[name]).attach(pipe)
    expected = run(pipe, pictures[:1], references=clips)
    motion.detach()
    denoiser = pipe.transformer if name == "cogvideox" else pipe.unet
    pipe.vae._hf_hook = type("Hook", (), {"execution_device": "cpu"})()
    if name == "svd":
        pipe.image_encoder._hf_hook = pipe.vae._hf_hook
    AwayHook(denoiser)
    motion.attach(pipe)
    assert denoiser.device.type == "meta"
    assert torch.equal(run(pipe, pictures[:1], references=clips), expected)
    assert {p.device.type for p in motion._model.adapter.parameters()} == {"cpu"}
    motion.detach()


def test_a_bfloat16_pipeline(cog, packages, pictures, clips):
    motion = MotionPackage.load(packages["cogvideox"]).attach(cog)
    exact = run(cog, pictures[:1], references=clips)
    bare = run(cog, pictures[:1])
    cog.to(torch.bfloat16)
    video = run(cog, pictures[:1], references=clips)
    assert {p.dtype for p in motion._model.adapter.parameters()} == {torch.bfloat16}
    assert (video - exact).abs().mean() < 0.5 * (bare - exact).abs().mean()
    motion.detach()


# ---------------------------------------------------------------- packages


@pytest.fixture
def copy(tmp_path):
    """A copy of the shipped package's own files."""
    for file in TINY.glob("*.*"):
        shutil.copy(file, tmp_path)
    return tmp_path


def test_an_imported_release(cog, packages, copy, pictures, clips, tmp_path):
    """It says which encoders it was trained with; here others of the right size stand in."""
    sizes = read_weights(copy / "cama.safetensors")[1]["about"]["sizes"]
    sites = dict.fromkeys(cogvideox().adapter_sites(), 160)
    export_release("cogvideox", copy, tmp_path / "theirs")
    import_release("cogvideox", tmp_path / "theirs", tmp_path / "ours", sizes, sites)
    encoders = MotionEncoder("pkg:tiny/videomae", size=32), AppearanceEncoder("pkg:tiny/dinov2", size=32)
    motion = MotionPackage.load("pkg:tiny").attach(cog)
    expected = run(cog, pictures[:1], references=clips)
    motion.detach()
    motion = MotionPackage.load(tmp_path / "ours", *encoders).attach(cog)
    assert torch.equal(run(cog, pictures[:1], references=clips), expected)
    motion.detach()
    with pytest.raises(MotionRAGError, match="MCG-NJU/videomae-base-finetuned-ssv2"):
        MotionPackage.load(tmp_path / "ours")


def test_releases_name_the_full_encoders(root):
    full = yaml.safe_load((root / "conf/encoders/full.yaml").read_text())
    for role, named in ENCODERS.items():
        assert named == {"name": full[role]["path"], "size": full[role]["size"]}


def test_a_package_brings_its_encoders(copy):
    for role, name in (("adapter", "videomae"), ("cama", "dinov2")):
        shutil.copytree(TINY / name, copy / name)
        file = copy / f"{role}.json"
        file.write_text(file.read_text().replace(f'"pkg:tiny/{name}"', f'"somebody/{name}"'))
    motion = MotionPackage.load(copy)
    assert motion.motion_encoder.weights == MotionEncoder("pkg:tiny/videomae", size=32).weights


def edit(file, **about):
    manifest = read_weights(file)[1]
    manifest["about"] |= about
    write_json(file.with_suffix(".json"), manifest)


def test_what_is_no_package(copy, random_encoders):
    with pytest.raises(
        MotionRAGError, match="'nobody/nothing' cannot be loaded .*expected a folder or hub id"
    ):
        MotionPackage.load("nobody/nothing")
    with pytest.raises(MotionRAGError, match="no weights file .*adapter.safetensors"):
        MotionPackage.load(copy / "..")
    with pytest.raises(
        MotionRAGError, match="was trained with the encoder .*videomae.*not with motion-random"
    ):
        MotionPackage.load(copy, motion_encoder=MotionEncoder(random_encoders["motion"], size=32))
    sizes = read_weights(copy / "cama.safetensors")[1]["about"]["sizes"]
    edit(copy / "cama.safetensors", sizes=sizes | {"cama": sizes["cama"] | {"depths": 3}})
    with pytest.raises(MotionRAGError, match="cama.json: no cama has the sizes .*depths"):
        MotionPackage.load(copy)
    edit(copy / "cama.safetensors", sizes={})
    with pytest.raises(MotionRAGError, match="cama.json does not say the sizes of cama"):
        MotionPackage.load(copy)
    weights = bytearray((copy / "cama.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "cama.safetensors").write_bytes(weights)
    with pytest.raises(MotionRAGError, match="is not the file that cama.json describes"):
        MotionPackage.load(copy)


@pytest.mark.parametrize(
    "change",
    [
        {"encoders": {"appearance": "dinov2"}},
        {"encoders": {"appearance": {"name": "pkg:tiny/dinov2"}}},
        {"sizes": {"cama": None}},
        {"sizes": []},
        {"encoders": None},
    ],
)
def test_manifests_that_say_something_else(copy, change):
    edit(copy / "cama.safetensors", **change)
    with pytest.raises(MotionRAGError, match="does not say the (sizes of cama|appearance encoder)"):
        MotionPackage.load(copy)


@pytest.mark.parametrize("key, value", [("width", -1), ("depth", "two")])
def test_manifests_with_sizes_of_no_network(copy, key, value):
    sizes = read_weights(copy / "cama.safetensors")[1]["about"]["sizes"]
    edit(copy / "cama.safetensors", sizes=sizes | {"cama": sizes["cama"] | {key: value}})
    with pytest.raises(MotionRAGError) as error:
        MotionPackage.load(copy)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("sizes", [{"output_dim": 96}, {"num_queries": 7}])
def test_stages_of_two_trainings(copy, sizes):
    """A CAMA that takes other motion tokens than the Resampler makes is refused before anything is loaded."""
    about = read_weights(copy / "cama.safetensors")[1]["about"]["sizes"]["cama"]
    options = {k: v for k, v in about.items() if k != "_target_"}
    appearance = {k: v for k, v in options["appearance_resampler"].items() if k != "_target_"} | sizes
    options |= {"appearance_resampler": appearance, "width": appearance["output_dim"]}
    cama = CAMA(Resampler(**appearance), **{k: v for k, v in options.items() if k != "appearance_resampler"})
    state = {f"cama.{k}": v for k, v in cama.state_dict().items()}
    manifest = read_weights(copy / "cama.safetensors")[1]["about"]
    save_weights(copy / "cama.safetensors", state, manifest | {"sizes": {"cama": options}})
    pipe = pipeline(cogvideox())
    before = dict(pipe.transformer.named_modules())
    with pytest.raises(
        MotionRAGError, match="Resampler of .* makes .* tokens of width .* the CAMA of .* takes"
    ):
        MotionPackage.load(copy).attach(pipe)
    assert before == dict(pipe.transformer.named_modules())


def test_a_manifest_chooses_no_code(copy):
    sizes = read_weights(copy / "cama.safetensors")[1]["about"]["sizes"]
    edit(copy / "cama.safetensors", sizes={"cama": sizes["cama"] | {"_target_": "os.abort"}})
    edit(copy / "adapter.safetensors", sizes={"resampler": sizes["resampler"] | {"_target_": "os.abort"}})
    assert isinstance(MotionPackage.load(copy).cama, CAMA)


# ---------------------------------------------------------------- mistakes


def test_pipelines_that_do_not_fit(cog, packages, pictures):
    motion = MotionPackage.load("pkg:tiny")
    with pytest.raises(
        MotionRAGError, match="cannot be attached to Linear: expected CogVideoXImageToVideoPipeline"
    ):
        motion.attach(nn.Linear(1, 1))
    svd, deeper = pipeline(SVD.tiny()), pipeline(CogVideoX.tiny(text=text, num_layers=6))
    for pipe, reason in (
        (svd, "down_blocks/0"),
        (deeper, "missing: motion_adapter.transformer_blocks/5/attn1"),
    ):
        kind = type(pipe)
        with pytest.raises(
            MotionRAGError, match=f"trained on cogvideox_tiny, cannot be attached .*{reason}"
        ) as error:
            motion.attach(pipe)
        assert "\n" not in str(error.value) and type(pipe) is kind
        denoiser = pipe.unet if pipe is svd else pipe.transformer
        assert not any(m._forward_pre_hooks for m in denoiser.modules())
    motion.attach(cog)
    with pytest.raises(MotionRAGError, match="is attached already: detach it first"):
        motion.attach(cog)
    cog.transformer = deeper.transformer
    with pytest.raises(
        MotionRAGError, match="was attached to has changed: the adapter has 5 sites, the backbone 6"
    ):
        run(cog, pictures[:1], references=np.zeros((9, 32, 32, 3), np.uint8))
    motion.detach()


def test_references_that_cannot_be_used(cog, packages, pictures, clips, tmp_path):
    motion = MotionPackage.load("pkg:tiny").attach(cog)
    stranger = MotionPackage.load("pkg:tiny")
    grey = np.zeros((9, 32, 32, 3), np.uint8)
    for references, options, message in (
        ([], {}, "references is empty"),
        ({}, {}, "expected packages that are attached"),
        ({stranger: clips}, {}, "expected packages that are attached"),
        ({motion: clips}, {"motion_scale": {stranger: 1}}, "expected packages that are attached"),
        (None, {"motion_scale": 1.0}, "need references"),
        (None, {"motion_prompt": "a ball"}, "need references"),
        (clips, {"k": 3}, "choose clips of a database"),
        (tmp_path, {"k": 2.5, "motion_prompt": "a ball"}, "k=2.5: expected a whole number"),
        (clips, {"motion_scale": "much"}, "motion_scale='much': expected a number"),
        (clips, {"motion_scale": float("nan")}, "motion_scale=nan: expected a number"),
        ("missing.mp4", {}, "missing.mp4: missing file"),
        (tmp_path, {"motion_prompt": "a ball"}, "expected a retrieval database"),
        (grey[..., :1], {}, r"uint8 \(9, 32, 32, 1\): expected uint8 \(T,H,W,3\)"),
        (to_float(grey) * 255, {}, "float with values up to 255"),
        (to_float(grey)[:0], {}, r"float32 \(0, 3, 32, 32\)"),
        (pictures, {}, "a reference clip is Image: expected uint8"),
        (grey[0], {}, "expected uint8"),
        ([grey] * 32, {}, "k=32: this CAMA takes at most 31"),
    ):
        with pytest.raises(MotionRAGError, match=message):
            run(cog, pictures[:1], references=references, **options)
    motion.detach()


# ---------------------------------------------------------------- from the hub


def test_a_package_of_the_hub(publish, pictures, clips):
    """A hub id gives what the folder gives; one that is not there is one line."""
    publish("someone/motion", TINY)
    videos = []
    for place in (TINY, "someone/motion"):
        pipe = pipeline(cogvideox())
        motion = MotionPackage.load(place)
        motion.attach(pipe)
        videos.append(run(pipe, pictures[:1], references=clips))
        motion.detach()
    assert torch.equal(*videos)
    with pytest.raises(MotionRAGError, match="package 'someone/else' cannot be loaded") as error:
        MotionPackage.load("someone/else")
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------- the page


def test_the_examples_of_the_page(monkeypatch, tmp_path, packages, pictures, clips, db):
    """All, as they stand; the published weights are the tiny ones here, with a text encoder put in."""
    monkeypatch.chdir(tmp_path)
    for name, clip in zip("ab", clips, strict=True):
        write_mp4(f"{name}.mp4", clip, 8)
    shutil.copytree(db, "db")
    shutil.copytree(TINY, "weights/cogvideox", dirs_exist_ok=True)
    published = pipeline(cogvideox())

    def encode_prompt(prompt, negative_prompt, *args, **kwargs):
        return text([prompt]), text([""])

    published.encode_prompt = encode_prompt
    examples = re.findall(PYTHON, DOC, flags=re.M | re.S)
    assert len(examples) == 3
    with monkeypatch.context() as patch:
        patch.setattr(CogVideoXImageToVideoPipeline, "from_pretrained", lambda name: published)
        full = {"image": pictures[0]}
        exec(examples[0].replace("num_frames=17", "num_frames=9, num_inference_steps=2"), full)
    assert len(full["video"]) == 9 and full["video"][0].size == (32, 32)
    full["motion"].detach()
    (readme,) = (e for e in re.findall(PYTHON, README, flags=re.M | re.S) if "MotionPackage" in e)
    short = {"image": pictures[0], "pipe": published, "MotionPackage": MotionPackage}
    exec(readme.replace("references=", "num_frames=9, num_inference_steps=2, references="), short)
    assert (
        len(short["video"]) == 9 and short["motion"].folder.resolve() == Path("weights/cogvideox").resolve()
    )
    tiny = {"image": pictures[0]}
    exec(examples[1].replace("num_inference_steps=25", "num_inference_steps=2"), tiny)
    assert tiny["retrieved"].shape == tiny["stronger"].shape == (1, 9, 32, 32, 3)
    shutil.copytree(packages["dynamicrafter"], "weights/dynamicrafter")
    crafter = BACKBONES["dynamicrafter"]()
    image = as_tensor(pictures[:1])
    with monkeypatch.context() as patch:
        patch.setattr(DynamiCrafter, "load", lambda *args, **options: crafter)
        own = {"image": image, "MotionPackage": MotionPackage}
        exec(examples[2].replace("seeds=", "steps=2, seeds="), own)
    assert own["video"].shape == (1, 9, 3, 32, 32)


def test_dynamicrafters_call_is_its_sampling(pictures):
    crafter, image = BACKBONES["dynamicrafter"](), as_tensor(pictures)
    options = {"steps": 2, "guidance": 2.0, "seeds": [3, 4]}
    for prompt, prompts in (("a ball", ["a ball"] * 2), (["a ball", "two balls"], ["a ball", "two balls"])):
        contexts = crafter.encode_context(prompts, image), crafter.null_context(image)
        assert torch.equal(crafter(image, prompt, **options), crafter.sample(image, *contexts, **options))
