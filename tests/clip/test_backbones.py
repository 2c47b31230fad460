"""Encoders of other kinds equal the libraries they come from (reference/backbones/make.py).

Pooled embedding, tapped tokens, both at another input size, text and the gradient of its context.
"""

import json
import shutil
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medclip_jax.clip import checkpoint, hf_weights, lite0
from medclip_jax.clip.text import encode_text
from medclip_jax.errors import CheckpointError, ConfigError
from medclip_jax.prompts.tokenize import Prompts
from tests.support import drawn
from tests.support.checkpoints import copy_tokenizer, image_features
from tests.support.paths import REFERENCE
from tests.support.predicting import run as predict
from tests.support.runs import predictions

FIXTURES = {p.stem: p for p in sorted((REFERENCE / "backbones").glob("*.npz"))}
IMAGES_ALONE = [name for name in FIXTURES if name.startswith("dino")]
PAIRS = [name for name in FIXTURES if name not in IMAGES_ALONE]


def write(name: str, folder: Path) -> Path:
    """The fixture as a checkpoint folder, with a tokenizer where it has a text encoder."""
    folder.mkdir(parents=True, exist_ok=True)
    said = json.loads((REFERENCE / "backbones" / f"{name}.json").read_text())
    for file, content in said["files"].items():
        (folder / file).write_text(json.dumps(content))
    target = "open_clip_model" if name.startswith("open_clip") else "model"
    save_file(drawn.weights(said["shapes"]), folder / f"{target}.safetensors")
    if name == "siglip":
        sentence_tokenizer(folder)
    elif "bert" in name:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "normal", "mass"]
        (folder / "vocab.txt").write_text("\n".join([*words, *(f"w{i}" for i in range(57))]))
    elif name in PAIRS:
        copy_tokenizer(folder)
    return folder


def sentence_tokenizer(folder: Path) -> None:
    """A tokenizer of SigLIP's kind, of few pieces."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["<pad>", "</s>", "<unk>", "▁", "▁normal", "▁mass", "es", "."]
    backend = Tokenizer(models.Unigram([(p, -float(i)) for i, p in enumerate(pieces)], unk_id=2))
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "SiglipTokenizer", "eos_token": "</s>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(fields | {"unk_token": "<unk>"}))


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """(name, size) -> the folder and the encoders, blocks 1 and 3 tapped."""

    @cache
    def load(name: str, size: int = 0):
        folder = tmp_path_factory.getbasetemp() / "backbones" / name
        if not folder.exists():
            write(name, folder)
        return checkpoint.load(str(folder), layers=(1, 3), size=size)

    return load


def near(ours, theirs, bound=2e-5):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.abs(theirs).max() > 0.01
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound * np.abs(theirs).max())


@pytest.mark.parametrize("size", [0, 48])
@pytest.mark.parametrize("name", FIXTURES)
def test_images_equal_the_reference(loaded, name, size):
    """48: positions are interpolated as the reference does, up from 32."""
    clip, expected, start = loaded(name, size), np.load(FIXTURES[name]), "larger_" * bool(size)
    pixels = drawn.pixels(1, size) if size else drawn.pixels(2, 32)
    assert (clip.size, clip.grid) == ((48, 6) if size else (32, 4))
    features = image_features(clip.vision, jnp.asarray(pixels), encoder=clip.image_encoder)
    near(features.pooled, expected[f"{start}pooled"])
    for block, tokens in zip((1, 3), features.levels, strict=True):
        near(tokens, expected[f"{start}tokens_{block}"])
    assert clip.joint == features.pooled.shape[1] and clip.widths == (tokens.shape[2],) * 2


@pytest.mark.parametrize("name", PAIRS)
def test_text_and_the_gradient_of_its_context_equal_the_reference(loaded, name):
    clip, expected = loaded(name), np.load(FIXTURES[name])
    ids, slots, last = expected["ids"], expected["slots"], np.array([5, 3])
    prompts = Prompts(ids, slots, last, np.array([0, 1]), ("", ""))

    @jax.jit
    def run(context):
        text = encode_text(clip.text, context, prompts, clip.text_encoder)
        return (text * expected["way"]).sum(), text

    (_, text), gradient = jax.value_and_grad(run, has_aux=True)(jnp.asarray(expected["context"]))
    near(text, expected["text"])
    near(gradient, expected["gradient"])
    assert clip.text_encoder.joint == clip.joint and clip.positions == 12


@pytest.mark.parametrize("name", PAIRS)
def test_padding_is_read_where_it_counts_and_cut_where_it_does_not(loaded, name):
    """All 12 positions, or as many as the longest phrase has: equal, but for SigLIP's."""
    clip, expected = loaded(name), np.load(FIXTURES[name])
    context, slots, last = (jnp.asarray(expected[x]) for x in ("context", "slots", "slots"))
    last = jnp.array([5, 3])
    run = jax.jit(
        lambda ids, slots: clip.text_encoder.apply({"params": clip.text}, context, ids, slots, last)
    )
    ids = jnp.asarray(expected["ids"])
    whole, cut = run(ids, slots), run(ids[:, :6], slots[:, :6])
    if name == "siglip":
        assert np.abs(whole - cut).max() > 1e-3
    else:
        near(cut, whole)


@pytest.mark.parametrize("name", PAIRS)
def test_patches_reach_the_joint_space_of_the_pooled_embedding(loaded, name):
    """An image of one token alone pools to that token's own projection."""
    clip = loaded(name)
    encoder = clip.image_encoder
    token = np.random.default_rng(0).normal(size=(1, 1, encoder.width)).astype(np.float32)
    project, pool = (
        jax.jit(lambda v, x, m=method: encoder.apply({"params": v}, x, method=m))(
            clip.vision, jnp.asarray(token)
        )
        for method in ("project", "pool")
    )
    near(project[:, 0], pool)


def test_a_map_head_projects_each_token_by_itself(loaded):
    clip = loaded("siglip")
    tokens = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 32)), jnp.float32)
    run = lambda x: clip.image_encoder.apply({"params": clip.vision}, x, method="project")  # noqa: E731
    near(run(tokens)[:, 3:], run(tokens[:, 3:]))


def test_siglip_reads_small_letters_without_punctuation(loaded):
    ids = loaded("siglip").tokenizer("Normal, Masses!", add_special_tokens=False).input_ids
    assert ids == [4, 5, 6] and loaded("siglip").eos_id == 1
    assert loaded("siglip").tokenizer(".", add_special_tokens=False).input_ids == []


def test_bert_reads_its_own_words(loaded):
    clip = loaded("open_clip_bert_mlp")
    assert clip.tokenizer("Normal mass.", add_special_tokens=False).input_ids == [5, 6, 4]
    assert (clip.tokenizer.bos_token_id, clip.eos_id) == (2, 3)


@pytest.mark.parametrize("name", IMAGES_ALONE)
def test_an_encoder_of_images_alone_has_no_text(loaded, name):
    clip = loaded(name)
    assert clip.text_encoder is None and clip.tokenizer is None and clip.text == {}
    assert clip.mean == hf_weights.IMAGENET[0]


# --- what is refused ----------------------------------------------------------------------------


def test_a_size_that_does_not_fit_the_patches_is_refused(loaded):
    with pytest.raises(ConfigError, match=r"clip.size is 50.*8 pixels: give 48 or 56"):
        loaded("dinov2", 50)
    with pytest.raises(ConfigError, match=r"clip.size is 1, .*8 pixels: give 8 or 16"):
        loaded("dinov2", 1)


@pytest.mark.parametrize("name", ["siglip", "dinov2", "dinov3_vit", "open_clip_bert_mlp"])
def test_what_is_missing_is_named_as_in_the_file(name, tmp_path):
    folder = write(name, tmp_path / name)
    said = json.loads((REFERENCE / "backbones" / f"{name}.json").read_text())
    path = next(folder.glob("*.safetensors"))
    tensors = drawn.weights(said["shapes"])
    lost = next(n for n in tensors if n.endswith("norm2.bias"))
    save_file({n: x for n, x in tensors.items() if n != lost}, path)
    with pytest.raises(CheckpointError, match=f"{lost.replace('.', '[.]')} is missing"):
        checkpoint.load(str(folder))
    wrong = dict(tensors)
    wrong[lost] = wrong[lost][:-1]
    save_file(wrong, path)
    with pytest.raises(CheckpointError, match="do not fit"):
        checkpoint.load(str(folder))


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("config.json", {"model_type": "siglip2"}, "model_type is 'siglip2', need one of clip"),
        ("config.json", {"model_type": "bert"}, "docs/backbones.md"),
        ("config.json", {"model_type": {"a": 1}}, "model_type is {'a': 1}, need one of clip"),
    ],
)
def test_other_kinds_are_refused(tmp_path, file, change, said):
    folder = write("siglip", tmp_path / "a")
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(str(folder))


@pytest.mark.parametrize(
    ("where", "change", "said"),
    [
        ((), {"multimodal_cfg": {}}, "this is a CoCa"),
        (("vision_cfg",), {"attentional_pool": True}, "attentional_pool is True, which is not"),
        (("vision_cfg",), {"timm_pool": "map"}, "timm_pool is 'map'"),
        (("vision_cfg",), {"pool_type": "avg"}, "pool_type is 'avg'"),
        (("text_cfg",), {"hf_pooler_type": "max_pooler"}, "hf_pooler_type is 'max_pooler'"),
        (("text_cfg",), {"no_causal_mask": True}, "no_causal_mask is True"),
        (("vision_cfg",), {"head_width": "64"}, "vision_cfg head_width is '64' where a whole"),
        (("vision_cfg",), {"layers": 10**9}, "is missing"),
        (("text_cfg",), {"context_length": "x"}, "text_cfg context_length is 'x' where a whole"),
        (("text_cfg",), {"context_length": -5}, "context_length is -5, outside 0 to 65536"),
        (("text_cfg",), {"heads": 1e400}, "text_cfg heads is inf where a whole number belongs"),
    ],
)
def test_what_open_clip_can_and_we_cannot_is_refused(tmp_path, where, change, said):
    folder = write("open_clip_bert_mlp", tmp_path / "a")
    path = folder / "open_clip_config.json"
    config = json.loads(path.read_text())
    part = config["model_cfg"]
    for name in where:
        part = part[name]
    part |= change
    path.write_text(json.dumps(config).replace("Infinity", "1e400"))
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(str(folder))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rope_theta": "x"}, "rope_theta is 'x' where a number belongs"),
        ({"rope_theta": 0}, "rope_theta is 0, outside 0.001 to"),
        ({"image_size": 4096, "patch_size": 4}, "patch_size of the images is 4, not 8"),
    ],
)
def test_numbers_of_an_encoder_without_positions(tmp_path, change, said):
    folder = write("dinov3_vit", tmp_path / "a")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=said):
        checkpoint.load(str(folder))


def test_a_block_of_a_great_number_is_one_sentence(tmp_path):
    """Not as many names of blocks."""
    folder = write("open_clip", tmp_path / "a")
    path = folder / "open_clip_model.safetensors"
    tensors = load_file(path)
    for number in ("999999", "9" * 5000):
        name = f"visual.transformer.resblocks.{number}.ln_1.weight"
        save_file(tensors | {name: np.zeros(1, np.float32)}, path)
        if len(number) > 9:  # no block
            assert checkpoint.load(str(folder)).image_encoder.depth == 3
        else:
            with pytest.raises(CheckpointError, match="is missing"):
                checkpoint.load(str(folder))


def test_a_sentencepiece_file_alone_says_what_to_do(tmp_path):
    folder = write("siglip", tmp_path / "a")
    shutil.move(folder / "tokenizer.json", folder / "spiece.model")
    with pytest.raises(CheckpointError, match="spiece.model alone.*write tokenizer.json"):
        checkpoint.load(str(folder))


# --- runs ---------------------------------------------------------------------------------------


def test_images_alone_score_by_memory_and_refuse_prompts(world, tmp_path, capfd):
    named = f"--config.clip.checkpoint={write('dinov3_vit', tmp_path / 'dino')}"
    assert world.main(tmp_path / "a", named, arguments="k=2") == 2
    said = capfd.readouterr().err
    assert "images alone, and learned, zero_shot_image needs prompts: give --config.method" in said
    assert not (tmp_path / "a" / "config.json").exists()
    assert world.main(tmp_path / "a", named, arguments="k=2,method=memory") == 0
    rows = predictions(tmp_path / "a")
    assert np.isfinite(rows["maps"]).all() and len(np.unique(rows["score"])) > 6
    assert predict(tmp_path / "a", tmp_path / "out", world.data / "test" / "good") == 0
    flags = named, "--config.branches=('memory',)"
    assert world.main(tmp_path / "b", *flags, arguments="k=2") == 0
    np.testing.assert_allclose(predictions(tmp_path / "b")["score"], rows["score"], rtol=1e-5)


@pytest.mark.slow
def test_siglip_trains_and_predicts(world, tmp_path):
    named = f"--config.clip.checkpoint={write('siglip', tmp_path / 'siglip')}"
    flags = named, "--config.steps=2", "--config.prompts.context=2"
    assert world.main(tmp_path / "a", *flags, arguments="k=2") == 0
    assert np.isfinite(predictions(tmp_path / "a")["maps"]).all()
    assert predict(tmp_path / "a", tmp_path / "out", world.data / "test" / "good") == 0


def test_check_says_what_a_checkpoint_is(loaded):
    lines = checkpoint.describe(loaded("dinov2_with_registers"), 816)
    assert lines["images"] == "ViT, 32 x 32 pixels, 4 x 4 patches, pooled to 32"
    assert lines["layers"] == "1, 3 of 3 are tapped" and "method=memory" in lines["text"]
    assert lines["cache"].startswith("3 MB")  # 816 images x 16 patches x 2 x 32 x 4 bytes
    lines = checkpoint.describe(loaded("siglip"), 816)
    assert lines["text"].startswith("TextEncoder, 12 positions; tokens by PreTrainedTokenizerFast")
    assert lines["licence"].startswith("its card says none")
    compact = checkpoint.load("compact")
    lines = checkpoint.describe(compact, 100)
    assert lines["licence"] == "cc-by-4.0"
    own = 196 * sum(compact.widths) * 4 / 1e4  # MB of 100 images
    assert lines["cache"].startswith(f"{own:.0f} MB")
    paired = checkpoint.describe(lite0.with_memory_encoder(compact), 100)
    assert paired["cache"].startswith(f"{own + 196 * 152 * 4 / 1e4:.0f} MB")
