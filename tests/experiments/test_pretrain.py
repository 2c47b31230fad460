"""Pre-training of the embedded CLIP, at a tiny size: data, tokenizer, leak check, loop, export."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from pretrain import captions, encoders, export, judge, leaks, loop, objective, tokens, views
from transformers import CLIPTokenizer, CLIPTokenizerFast

from medclip_jax.clip import checkpoint
from medclip_jax.data import phantom
from tests.support.checkpoints import Theirs
from tests.support.paths import ROOT

ROWS = [
    views.Row(f"{n}.png", "made", "none", modality, "axial" if modality == "brain mri" else "",
              "abnormal" if finding else "normal", finding, "label")
    for n, (modality, finding) in enumerate(captions.CLASSES)
]  # fmt: skip
DISEASE_WORDS = {
    "normal",
    "abnormal",
    "healthy",
    "diseased",
    "disease",
    "tumor",
    "mass",
    "signs",
    "sick",
}


@pytest.fixture(scope="module")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    rng = np.random.default_rng(0)
    said = [captions.make_caption(row, rng).text for row in ROWS * 60]
    tokens.write_tokenizer(folder, said, 700)
    return folder


@pytest.fixture(scope="module")
def config(tokenizer_folder):
    entries = len(CLIPTokenizerFast.from_pretrained(tokenizer_folder))
    small = {"text_width": 16, "text_layers": 1, "text_heads": 2, "joint": 16}
    return encoders.make_config(entries, width=32, layers=4, heads=2, **small)


@pytest.fixture(scope="module")
def model(config):
    return encoders.build(config)


@pytest.fixture(scope="module")
def material(tokenizer_folder):
    rng = np.random.default_rng(1)
    shard = views.Shard(
        index=np.arange(len(ROWS)),
        pixels=rng.integers(0, 255, (len(ROWS), 224, 224), dtype=np.uint8),
        fine=rng.normal(size=(len(ROWS), 14, 14, 40)).astype(np.float16),
        coarse=rng.normal(size=(len(ROWS), 14, 14, 112)).astype(np.float16),
        pooled=rng.normal(size=(len(ROWS), 1280)).astype(np.float16),
    )
    return loop.Material(
        shards=[shard],
        rows=ROWS,
        scales=loop.channel_scales([shard]),
        tokenizer=CLIPTokenizerFast.from_pretrained(tokenizer_folder),
        phrases=["no signs of glioma", "a healthy liver"],
        meaning=np.eye(2, 384, dtype=np.float32),
    )


def test_leak_check_finds_planted_duplicates(tmp_path):
    rng = np.random.default_rng(0)
    images = []
    for _ in range(6):
        coarse = Image.fromarray(rng.integers(0, 255, (8, 8), dtype=np.uint8))
        images.append(coarse.resize((224, 224), Image.Resampling.BICUBIC))
    for folder in ("train", "held", "films"):
        (tmp_path / folder).mkdir()
    for n in range(4):
        images[n].save(tmp_path / "train" / f"{n}.png")
    images[1].resize((301, 187)).point(lambda v: v * 0.7 + 20).save(tmp_path / "held" / "a.jpg")
    images[4].save(tmp_path / "held" / "b.png")
    images[2].save(tmp_path / "films" / "c.png")
    images[3].save(tmp_path / "held" / "b_mask.png")  # masks are no images
    train = [tmp_path / "train" / f"{n}.png" for n in range(4)]
    sets = {"held": tmp_path / "held", "films": tmp_path / "films"}
    keep, counts = leaks.leak_check(train, sets, {"films"})
    assert keep.tolist() == [True, False, True, True]
    assert [(c.evaluation_images, c.near_duplicates, c.excluded) for c in counts] == [
        (2, 1, True),
        (1, 1, False),
    ]
    assert counts[0].highest > 0.95


def test_constant_image_is_no_duplicate(tmp_path):
    Image.new("L", (50, 50), 90).save(tmp_path / "flat.png")
    assert not leaks.thumbnails([tmp_path / "flat.png"]).any()


def test_captions_are_true_of_their_image():
    rng = np.random.default_rng(3)
    for row in ROWS * 100:
        caption = captions.make_caption(row, rng)
        assert captions.class_of(row) in caption.classes, caption
        assert caption.plane in ("", row.plane)
        words = caption.text.split()
        if "normal" in words or "healthy" in words:
            assert all(captions.CLASSES[c][1] == "" for c in caption.classes), caption
        if ("abnormal" in words and "without" not in words) or "diseased" in words:
            assert all(captions.CLASSES[c][1] for c in caption.classes), caption


def test_matches_by_hand():
    glioma, meningioma, chest = ROWS[1], ROWS[2], ROWS[4]
    texts = [
        captions.Caption("brain mri without glioma", (0, 2, 3), ""),
        captions.Caption("coronal brain mri", (0, 1, 2, 3), "coronal"),
        captions.Caption("axial brain mri", (0, 1, 2, 3), "axial"),
    ]
    expected = [[0, 0, 1], [1, 0, 1], [0, 0, 0]]
    assert captions.matches(texts, [glioma, meningioma, chest]).tolist() == expected


def test_no_findings_means_no_word_of_disease():
    """Where they are not wanted, and where the source of an image would tell its state."""
    rng = np.random.default_rng(4)
    for row in ROWS * 20:
        wanted = rng.random() < 0.5
        seen = row._replace(state_from="look may tell") if wanted else row
        caption = captions.make_caption(seen, rng, findings=wanted)
        assert not DISEASE_WORDS & set(caption.text.replace(",", "").split()), caption
        assert caption.classes == captions.classes_of(row.modality, None)


def test_tokenizer_round_trip(tokenizer_folder):
    fast = CLIPTokenizerFast.from_pretrained(tokenizer_folder)
    slow = CLIPTokenizer.from_pretrained(tokenizer_folder)
    for text in ("a normal brain mri", "no signs of zebra-like œdema, 3 mm!"):
        ids = fast(text)["input_ids"]
        assert ids == slow(text)["input_ids"]
        joined = fast.decode(ids, skip_special_tokens=True).replace(" ", "")
        assert joined == text.replace(" ", "")
    assert fast.tokenize("normal brain mri") == ["normal</w>", "brain</w>", "mri</w>"]
    assert fast.eos_token_id == fast.pad_token_id == len(fast) - 1
    ids = tokens.encode(fast, ["healthy brain"], 77)
    assert ids.shape == (1, 77) and ids[0].argmax() == 3 and (ids[0, 3:] == len(fast) - 1).all()


def test_similarity_sees_cosines_only():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(3, 14, 6)))
    turn = jnp.asarray(np.linalg.qr(rng.normal(size=(6, 6)))[0])
    assert objective.similarity(x, 3 * x @ turn) < 1e-10
    assert objective.similarity(x, jnp.flip(x, 1)) > 1e-3


def test_contrast_closed_forms():
    eye = jnp.eye(4)
    assert objective.contrast(eye, eye, jnp.ones((4, 4)), jnp.zeros(())) == pytest.approx(np.log(4))
    expected = np.log(1 + 3 * np.exp(-2.0))
    assert objective.contrast(eye, eye, eye, jnp.array(2.0)) == pytest.approx(expected, rel=1e-5)


def test_rate_follows_the_budget():
    plan = loop.Plan(rate=1.0)
    assert loop.rate_at(plan, 0.0, 0) == pytest.approx(0.01)
    assert loop.rate_at(plan, 0.5, 500) == pytest.approx(0.5)
    assert loop.rate_at(plan, 1.0, 500) == pytest.approx(0.01)


def test_a_stopped_process_loses_no_budget():
    assert loop.counted([2.0, 2.0, 2.0, 600.0]) == 10.0
    assert loop.counted([30.0]) == 30.0


def test_views_depend_on_their_generator_only():
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224), dtype=np.uint8)
    first, again, other = (
        views.random_view(pixels, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    order = views.view_order(ROWS, {"breast ultrasound": 4}, 0, 0)
    assert np.bincount(order).tolist() == [1] * 6 + [4] * 3 + [1] * (len(ROWS) - 9)


def test_shards_round_trip(tmp_path, material):
    views.write_shard(tmp_path / "shard-0000", material.shards[0])
    (tmp_path / "shard-0001").mkdir()  # begun, not complete
    (read,) = views.read_shards(tmp_path)
    for ours, theirs in zip(read, material.shards[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mirroring_moves_pixels_and_features_together(material):
    plan = loop.Plan(batch=16)
    batch = loop.make_batch(material, plan, 0, 196)
    chosen = np.random.default_rng([plan.seed, 13, 0]).integers(len(ROWS), size=16)
    flips = 0
    mean, sd = material.scales["fine"]
    for n, place in enumerate(chosen):
        pixels, fine = (getattr(material.shards[0], k)[place] for k in ("pixels", "fine"))
        flipped = not np.array_equal(batch.pixels[n], pixels)
        flips += flipped
        if flipped:
            np.testing.assert_array_equal(batch.pixels[n], pixels[:, ::-1])
            fine = fine[:, ::-1]
        grid = ((fine.astype(np.float32) - mean) / sd).reshape(196, 40)
        np.testing.assert_allclose(batch.fine[n], grid[batch.keep[n]], rtol=1e-5, atol=1e-5)
    assert 0 < flips < 16


def test_all_patches_in_any_order_give_the_full_encoder(model):
    params = encoders.init(model, 0)
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.integers(0, 255, (2, 224, 224), dtype=np.uint8))
    order = np.stack([rng.permutation(196) for _ in range(2)])
    encode = jax.jit(lambda keep: encoders.encode_image(params, model, pixels, keep)[1])
    full, mixed = encode(np.tile(np.arange(196), (2, 1))), encode(order)
    np.testing.assert_allclose(mixed[:, 0], full[:, 0], atol=1e-4)
    np.testing.assert_allclose(mixed[0, 1:], full[0, 1:][order[0]], atol=1e-4)


def test_resumed_equals_uninterrupted_and_loads_elsewhere(
    tmp_path, monkeypatch, capsys, material, config, model, tokenizer_folder
):
    plan = loop.Plan(steps=6, batch=8, patches=12, full_tail=0.0, rate=1e-2, save_minutes=0.0)
    begin = loop.start(encoders.init(model, 0), model, 0)
    whole = loop.run(material, model, plan, begin, tmp_path / "whole.safetensors")
    lines = [s for s in capsys.readouterr().out.split("\r") if "total" in s]
    totals = [float(s.split("total")[1].split()[0]) for s in lines]
    assert len(totals) == 6 and np.mean(totals[-2:]) < np.mean(totals[:2])

    def interrupted(material, plan, number, kept):
        if number == 2:
            raise KeyboardInterrupt
        return make_batch(material, plan, number, kept)

    make_batch, path = loop.make_batch, tmp_path / "parts.safetensors"
    monkeypatch.setattr(loop, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(material, model, plan, begin, path)
    monkeypatch.setattr(loop, "make_batch", make_batch)
    assert loop.restore(path, begin)[1] == 2
    resumed = loop.run(material, model, plan, begin, path)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    export.write_folder(tmp_path / "out", whole.average, config, tokenizer_folder, "# card")
    check_export(tmp_path / "out", jax.tree.map(np.asarray, whole.average), model, material)


def check_export(folder, params, model, material):
    """The exported folder in the package and in transformers is the model that was trained."""
    clip = checkpoint.load(str(folder))
    for a, b in zip(jax.tree.leaves(clip.params), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), b)
    pixels = material.shards[0].pixels[:2]
    grey = jnp.asarray(pixels, jnp.float32) / 255
    images = checkpoint.normalise(grey, clip.mean, clip.std).transpose(0, 3, 1, 2)
    ids = tokens.encode(material.tokenizer, ["a healthy brain", "no signs of glioma"], 77)
    with jax.numpy_rank_promotion("allow"):
        flax_clip = Theirs.from_pretrained(folder)
        seen, read = jax.jit(
            lambda p: (
                flax_clip.get_image_features(images, params=p),
                flax_clip.get_text_features(ids, params=p),
            )
        )(flax_clip.params)
    last = jax.jit(lambda x: encoders.encode_image(params, model, x)[1])(jnp.asarray(pixels))
    ours = encoders.project(params, model, last)[:, 0]
    np.testing.assert_allclose(ours, seen, atol=1e-4)
    ours = encoders.encode_text(params, model, jnp.asarray(ids))
    np.testing.assert_allclose(ours, read, atol=1e-4)


def test_folders_are_judged_by_the_packages_methods(tmp_path, config, model, tokenizer_folder):
    data = phantom.write_folder(tmp_path / "data", "ultrasound", 0, 32, 3, 1, 1)
    export.write_folder(tmp_path / "fresh", encoders.init(model, 0), config, tokenizer_folder)
    fields = [f"data.root={data}", f"cache={tmp_path}/cache"]
    configs = [ROOT / "configs" / "folder.py"]
    text = judge.judge([tmp_path / "fresh"], tmp_path / "runs", fields, configs, (2,), 1)
    head, _, row = text.splitlines()
    assert head == "| model | set | zero_shot K=2 | memory K=2 |"
    assert row.startswith("| fresh | folder | ") and row.count("±") == 2
