"""The ResNet tower against open_clip's own module (tests/reference/clip_resnet/make.py), and as a
choice of clip.checkpoint."""

import json
import re
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medclip_jax.clip import checkpoint as clip_checkpoint
from medclip_jax.clip import hf_weights, open_clip_weights, resnet, tensor_files
from medclip_jax.clip.text import encode_text
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.prompts import tokenize
from tests.support.checkpoints import copy_tokenizer, tiny_checkpoint
from tests.support.paths import REFERENCE
from tests.support.predicting import run as predict
from tests.support.runs import log, predictions

FIXTURE = REFERENCE / "clip_resnet"
WEIGHTS = FIXTURE / "tower.safetensors"


def run(params, pixels, encoder, method=None):
    return jax.jit(partial(encoder.apply, method=method))({"params": params}, pixels)


def test_it_equals_open_clip():
    ref = np.load(FIXTURE / "expected.npz")
    params, tower = resnet.read(load_file(WEIGHTS))
    assert tower == resnet.ResNet((2, 1, 2, 1), 4, 64, 8, (2, 3, 4))
    tower = resnet.tapped(tower, (1, 2, 3, 4), "float32", False)
    got = run(params, jnp.asarray(ref["pixels"]), tower, "stages")
    np.testing.assert_allclose(got.pooled, ref["pooled"], atol=1e-4 * np.abs(ref["pooled"]).max())
    assert np.abs(ref["pooled"]).max() > 0.1
    for number, level in enumerate(got.levels, 1):
        want = ref[f"stage{number}"]
        assert level.shape == (2, (64 // 2 ** (number + 1)) ** 2, want.shape[-1])
        np.testing.assert_allclose(level.reshape(want.shape), want, atol=1e-4 * np.abs(want).max())


def test_tapped_stages_come_on_one_grid():
    ref = np.load(FIXTURE / "expected.npz")
    params, tower = resnet.read(load_file(WEIGHTS))
    pixels = jnp.asarray(ref["pixels"])
    got = run(params, pixels, tower)
    assert [x.shape[1] for x in got.levels] == [16, 16, 16]
    of_two = ref["stage2"].reshape(2, 4, 2, 4, 2, -1).mean((2, 4)).reshape(2, 16, -1)
    assert np.abs(of_two).max() > 0.1
    np.testing.assert_allclose(got.levels[0], of_two, atol=1e-4)
    np.testing.assert_allclose(got.levels[1], ref["stage3"].reshape(2, 16, -1), atol=1e-4)
    coarse = got.levels[2].reshape(2, 4, 4, -1)  # corners stay, means stay
    np.testing.assert_allclose(coarse[:, 0, 0], ref["stage4"][:, 0, 0], atol=1e-4)
    np.testing.assert_allclose(coarse.mean((1, 2)), ref["stage4"].mean((1, 2)), atol=1e-4)
    low = run(params, pixels, tower.clone(dtype="bfloat16"))
    assert low.pooled.dtype == jnp.float32
    np.testing.assert_allclose(low.pooled, got.pooled, atol=0.05 * np.abs(got.pooled).max())


@pytest.mark.parametrize(
    ("depths", "width", "heads", "size"),
    [  # OpenAI's RN50, RN101, RN50x4, RN50x16, RN50x64: what open_clip's configs say of them
        ((3, 4, 6, 3), 64, 32, 224),
        ((3, 4, 23, 3), 64, 32, 224),
        ((4, 6, 10, 6), 80, 40, 288),
        ((6, 8, 18, 8), 96, 48, 384),
        ((3, 15, 36, 10), 128, 64, 448),
    ],
)
def test_sizes_of_the_published_towers_follow_from_the_tensors(depths, width, heads, size):
    flat = {"attnpool.positional_embedding": np.zeros(((size // 32) ** 2 + 1, width * 32))}
    flat |= {f"layer{s}.{i}.conv1.weight": None for s, n in enumerate(depths, 1) for i in range(n)}
    flat["attnpool.c_proj.bias"] = np.zeros(7)
    assert resnet.of_tensors(flat) == resnet.ResNet(depths, width, size, 7)
    assert width * 32 // resnet.HEAD == heads


# --- a whole checkpoint -------------------------------------------------------------------------


def to_openclip(name: str) -> str:
    """transformers' name of a tensor of the text tower under OpenAI's."""
    for old, new in (
        ("text_model.encoder.layers", "transformer.resblocks"),
        ("text_model.embeddings.token_embedding", "token_embedding"),
        ("text_model.embeddings.position_embedding.weight", "positional_embedding"),
        ("text_model.final_layer_norm", "ln_final"),
        ("text_projection.weight", "text_projection"),
        ("layer_norm1", "ln_1"),
        ("layer_norm2", "ln_2"),
        ("self_attn.out_proj", "attn.out_proj"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
    ):
        name = name.replace(old, new)
    return name


def openclip_tensors(msgpack: Path) -> dict[str, np.ndarray]:
    """The fixture's image tower and a tiny text tower, in open_clip's names and layouts."""
    flat = {}
    for n, x in tensor_files.read(msgpack).items():
        if not n.startswith("vis"):
            name = re.sub(r"\.(kernel|scale|embedding)$", ".weight", n.replace("/", "."))
            flat[name] = x.T if n.endswith("kernel") else x
    at = "text_model.encoder.layers.{}.self_attn.{}_proj.{}"
    for i in range(2):
        for part in ("weight", "bias"):
            rows = [flat.pop(at.format(i, x, part)) for x in "qkv"]
            flat[f"transformer.resblocks.{i}.attn.in_proj_{part}"] = np.concatenate(rows)
    made = {to_openclip(n): x for n, x in flat.items()}
    made["text_projection"] = made["text_projection"][:8].T  # the fixture's joint space has 8
    return {n: np.ascontiguousarray(x) for n, x in (load_file(WEIGHTS) | made).items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resnet")
    tensors = openclip_tensors(
        tiny_checkpoint(folder / "vit", text_blocks=2)[0] / "flax_model.msgpack"
    )
    save_file(tensors, folder / hf_weights.OPEN_CLIP[0])
    vision = {"patch_size": None, "image_size": [64, 64]}  # as open_clip's own: they are not read
    text = {"quick_gelu": False, "text_cfg": {"heads": 2}, "vision_cfg": vision}
    config = {"model_cfg": text, "preprocess_cfg": {"mean": [0.5] * 3}}
    (folder / open_clip_weights.CONFIG).write_text(json.dumps(config))
    copy_tokenizer(folder)
    return folder


def test_the_text_tower_equals_transformers_layout(checkpoint):
    resnet, vit = (
        clip_checkpoint.load(str(checkpoint)),
        clip_checkpoint.load(str(checkpoint / "vit")),
    )
    assert resnet.mean == (0.5, 0.5, 0.5) and resnet.std == hf_weights.STD
    assert (resnet.size, resnet.grid, resnet.joint) == (64, 4, 8)
    assert resnet.widths == (32, 64, 128) and resnet.text_encoder.activation == "gelu"

    def features(tower):
        made = tokenize.build(
            tower.tokenizer,
            tower.eos_id,
            phrases="templates",
            words=tokenize.Words(("breast",), ("mass",), ("ultrasound",)),
            context=0,
            position="end",
        )
        empty = jnp.zeros((len(made.ids), 0, tower.text_width))
        return encode_text(tower.text, empty, made, tower.text_encoder)

    want = features(vit)[:, :8]
    np.testing.assert_allclose(features(resnet), want, atol=1e-5 * np.abs(want).max())


def test_patches_of_the_last_stage_reach_the_joint_space(checkpoint):
    """A token in all places is what the attention pool then returns, but for its positions."""
    tower = clip_checkpoint.load(str(checkpoint))
    token = np.random.default_rng(0).normal(size=(1, 1, 1, 128)).astype(np.float32)
    pool = dict(tower.vision["attnpool"], position=jnp.zeros((5, 128)))
    everywhere = jnp.broadcast_to(jnp.asarray(token), (1, 2, 2, 128))
    module = resnet.AttentionPool(5, 128, 2, 8, "float32")
    want = module.apply({"params": pool}, everywhere)
    project = partial(tower.image_encoder.apply, method="project")
    got = project({"params": tower.vision}, jnp.asarray(token[0]))
    np.testing.assert_allclose(got[0], want, atol=1e-5)
    early = clip_checkpoint.load(str(checkpoint), layers=(2, 3))
    with pytest.raises(ConfigError, match="plain prompts need stage 4"):
        early.image_encoder.apply({"params": early.vision}, jnp.zeros((1, 1, 64)), method="project")
    with pytest.raises(ConfigError, match="int8', which works with a ViT"):
        clip_checkpoint.load(str(checkpoint), dtype="int8")


@pytest.mark.slow
def test_a_run_with_a_resnet_ends_in_a_report_and_predicts(world, checkpoint, tmp_path):
    resnet = f"--config.clip.checkpoint={checkpoint}"
    branches = "--config.branches=('learned','memory','zero_shot')"
    flags = (resnet, branches, "--config.steps=3")
    assert world.main(tmp_path / "a", *flags, arguments="k=2") == 0
    assert [row["step"] for row in log(tmp_path / "a")] == [3]
    rows = predictions(tmp_path / "a")
    assert rows["maps"].shape[1:] == (64, 64) and np.isfinite(rows["maps"]).all()
    assert len(np.unique(rows["score"])) > 6
    assert (tmp_path / "a" / "report.html").is_file()
    assert predict(tmp_path / "a", tmp_path / "out", world.data / "test" / "good") == 0


def test_what_a_resnet_cannot_do_is_said(world, checkpoint, tmp_path, capfd):
    for flag, said in (("model.refine=True", "a ResNet lacks"), ("clip.layers=(2,5)", "1 to 4")):
        flags = (f"--config.clip.checkpoint={checkpoint}", f"--config.{flag}")
        assert world.main(tmp_path / "a", *flags, arguments="k=2") == 2
        assert said in capfd.readouterr().err


@pytest.mark.parametrize(
    "lacks", ["visual.layer2.0.bn2.running_var", "ln_final.bias", "visual.attnpool.k_proj.bias"]
)
def test_missing_tensors_are_named(checkpoint, tmp_path, lacks):
    tensors = load_file(checkpoint / hf_weights.OPEN_CLIP[0])
    del tensors[lacks]
    save_file(tensors, tmp_path / hf_weights.OPEN_CLIP[0])
    copy_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=f"{lacks.replace('.', '[.]')} is missing"):
        clip_checkpoint.load(str(tmp_path))


def test_damaged_files_are_said(checkpoint, tmp_path):
    copy_tokenizer(tmp_path)
    whole = (checkpoint / hf_weights.OPEN_CLIP[0]).read_bytes()
    (tmp_path / hf_weights.OPEN_CLIP[0]).write_bytes(whole[:1000])
    with pytest.raises(CheckpointError, match="download it again"):
        clip_checkpoint.load(str(tmp_path))
    (tmp_path / hf_weights.OPEN_CLIP[0]).write_bytes(whole)
    plain = clip_checkpoint.load(str(tmp_path))  # OpenAI's file has no config
    assert plain.text_encoder.activation == "quick_gelu" and plain.mean == hf_weights.MEAN
    assert plain.digest != clip_checkpoint.load(str(checkpoint)).digest
    (tmp_path / open_clip_weights.CONFIG).write_text("{")
    with pytest.raises(CheckpointError, match="copy it again"):
        clip_checkpoint.load(str(tmp_path))
