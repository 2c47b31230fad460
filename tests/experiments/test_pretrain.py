"""Pre-training of the embedded CLIP, at a tiny size: data, tokenizer, leak check, loop, export."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pretrain_compact_clip
import pytest
from PIL import Image
from pretrain import (
    captions,
    card,
    device,
    encoders,
    export,
    judge,
    leaks,
    lite0,
    loop,
    objective,
    tokens,
    views,
)
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
        places=np.arange(len(ROWS)),
        rows=ROWS,
        scales=loop.channel_scales([shard]),
        tokenizer=CLIPTokenizerFast.from_pretrained(tokenizer_folder),
        phrases=["no signs of glioma", "a healthy liver"],
        meaning=np.eye(2, 384, dtype=np.float32),
    )


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


def test_sigmoid_loss_closed_forms():
    """Every pair is a question of its own: duplicate captions are all positives."""
    eye, none, zero = jnp.eye(4), jnp.zeros((4, 4)), jnp.zeros(())
    even = objective.sigmoid_loss(eye, eye, eye, zero, zero)
    assert even == pytest.approx(4 * np.log(2))
    same = jnp.ones((4, 4))
    doubled = objective.sigmoid_loss(same, same, same, jnp.array(2.0), jnp.array(1.0))
    assert doubled == pytest.approx(4 * np.log(1 + np.exp(-3.0)), rel=1e-5)
    negative = objective.sigmoid_loss(eye, eye, none, jnp.array(2.0), zero)
    assert negative == pytest.approx(np.log(1 + np.exp(2.0)) + 3 * np.log(2), rel=1e-5)


def test_sinkhorn_balances_rows_and_columns():
    rng = np.random.default_rng(0)
    q = objective.sinkhorn(jnp.asarray(rng.normal(size=(64, 8))), rounds=50)
    np.testing.assert_allclose(q.sum(1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(q.sum(0), 8.0, rtol=1e-4)


def test_agreement_closed_forms():
    """Equal places of one kind each agree but for the temperature; alike patches cannot."""
    eye = jnp.eye(4)
    z = np.exp(1 / objective.STUDENT)
    p, t = z / (z + 3), objective.sinkhorn(eye / objective.TARGET)
    entropy = -(t[0, 0] * np.log(p) + (1 - t[0, 0]) * np.log((1 - p) / 3))
    assert objective.agreement(eye, eye, eye) == pytest.approx(float(entropy), abs=1e-5)
    assert objective.agreement(3 * eye, eye, 2 * eye) == pytest.approx(float(entropy), abs=1e-5)
    assert objective.agreement(eye, jnp.roll(eye, 1, 0), eye) > 5
    alike = jnp.ones((4, 4))
    assert objective.agreement(alike, alike, eye) == pytest.approx(np.log(4), rel=1e-4)


def test_parts_of_weight_0_are_left_out_and_the_others_are_the_same(material, model):
    params = loop.start(encoders.init(model, 0), model, 0).params
    images = objective.Weights(agreement=0, caption=0, patch_caption=0, phrase=0)
    batch = loop.make_batch(material, loop.Plan(1, batch=8, weights=images), 0, 9)
    assert images.pairs(8) == 0 and objective.Weights().pairs(8) == 2
    run = jax.jit(objective.loss, static_argnums=(1, 2))
    total, parts = run(params, model, images, batch)
    whole = run(params, model, objective.Weights(), batch)[1]
    assert set(parts) == {"fine", "coarse", "pooled", "similarity"}
    assert len(whole) == 8
    for name, value in parts.items():
        np.testing.assert_allclose(value, whole[name], rtol=1e-5)
    expected = sum(getattr(images, n) * x for n, x in parts.items())
    np.testing.assert_allclose(total, expected, rtol=1e-6)


def test_captions_teach_the_image_encoder_as_much_as_they_may(material, model):
    params = loop.start(encoders.init(model, 0), model, 0).params
    texts = objective.Weights(0, 0, 0, 0, 0, 1, 1, 1, into_image=1.0)
    batch = loop.make_batch(material, loop.Plan(1, batch=8, weights=texts), 0, 9)
    run = jax.jit(jax.grad(objective.loss, has_aux=True), static_argnums=(1, 2))
    whole = run(params, model, texts, batch)[0]["clip"]
    blocks = jax.tree.leaves(whole["vision_model"]["encoder"])
    assert max(float(jnp.abs(x).max()) for x in blocks) > 1e-5
    for share in (0.0, 0.5):
        part = run(params, model, texts._replace(into_image=share), batch)[0]["clip"]
        for name in ("text_model", "visual_projection", "text_projection"):
            for a, b in zip(*map(jax.tree.leaves, (part[name], whole[name])), strict=True):
                np.testing.assert_allclose(a, b, 1e-5, 1e-7)
        for a, b in zip(jax.tree.leaves(part["vision_model"]["encoder"]), blocks, strict=True):
            np.testing.assert_allclose(a, share * b, rtol=1e-4, atol=1e-7)


def test_gradients_are_clipped_each_on_its_own():
    given = {"clip": {"a": {"x": np.array([3.0, 0.0]), "y": np.array(4.0)}}, "heads": {"b": 0.5}}
    got = objective.clip_each(given)
    np.testing.assert_allclose(got["clip"]["a"]["x"], [0.6, 0], rtol=1e-6)
    assert got["clip"]["a"]["y"] == pytest.approx(0.8) and got["heads"]["b"] == 0.5


def test_the_optimiser_turns_matrices_of_blocks_and_nothing_else_into_near_rotations():
    rng = np.random.default_rng(0)
    block = {"kernel": rng.normal(size=(24, 16)), "bias": rng.normal(size=16)}
    grown = {"clip": {"vision_model": {"layers": {"0": block}}, "visual_projection": block}}
    grown |= {"heads": {"fine.weight": rng.normal(size=(24, 16))}}
    gradient = jax.tree.map(jnp.float32, grown)
    still = jax.tree.map(jnp.zeros_like, gradient)  # no decay of weights
    optimiser = objective.make_optimiser()
    updates, _ = optimiser.update(gradient, optimiser.init(still), still)
    turned = updates["clip"]["vision_model"]["layers"]["0"].pop("kernel")
    spectrum = np.linalg.svd(np.asarray(turned), compute_uv=False) / objective.ORTHOGONAL
    assert 0.5 < spectrum.min() and spectrum.max() < 1.3
    for x in jax.tree.leaves(updates):  # the first step of Adam is a sign
        np.testing.assert_allclose(np.abs(x), 1, rtol=1e-3)


def test_rate_is_constant_between_warm_up_and_decay():
    """Any stop will do: nothing but the warm-up depends on how long the run is."""
    plan = loop.Plan(steps=2000, rate=1.0)
    assert loop.rate_at(plan, 0) == pytest.approx(1 / loop.WARM_UP)
    assert [loop.rate_at(plan, n) for n in (500, 1999)] == [1, 1]
    plan = plan._replace(decay=100)
    assert loop.rate_at(plan, 1899) == 1
    assert loop.rate_at(plan, 1950) == pytest.approx(0.5)
    assert loop.rate_at(plan, 1999) == pytest.approx(0.01)


def test_views_depend_on_their_generator_only():
    pixels = np.random.default_rng(0).integers(0, 255, (224, 224), dtype=np.uint8)
    first, again, other = (
        views.random_view(pixels, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_modalities_share_a_shard_as_roots_of_their_counts():
    names = ["a"] * 900 + ["b"] * 100
    shards = [views.balanced(names, 0, number) for number in range(3)]
    of_a = [index[index < 900] for index in shards]
    assert [len(x) for x in of_a] == [384] * 3 and {len(x) for x in shards} == {views.SHARD}
    shown = np.bincount(np.concatenate(of_a), minlength=900)
    assert shown.min() == 1 and shown.max() == 2  # in turn
    shown = np.bincount(np.concatenate([x[x >= 900] for x in shards]) - 900)
    assert shown.min() == 3 and shown.max() == 4
    assert np.array_equal(shards[2], views.balanced(names, 0, 2))


def test_shards_round_trip(tmp_path, material):
    views.write_shard(tmp_path / "shard-0000", material.shards[0])
    (tmp_path / "shard-0001").mkdir()  # begun, not complete
    (read,) = views.read_shards(tmp_path)
    for ours, theirs in zip(read, material.shards[0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_mirroring_moves_pixels_and_features_together(material):
    plan = loop.Plan(1, batch=32)
    batch = loop.make_batch(material, plan, 0, 196)
    chosen = np.random.default_rng([plan.seed, 13, 0]).choice(np.arange(len(ROWS)), size=32)
    chosen[24:] = chosen[:8]
    flips = 0
    mean, sd = material.scales["fine"]
    for n, place in enumerate(chosen):
        pixels, fine = (getattr(material.shards[0], k)[place] for k in ("pixels", "fine"))
        flipped = not np.array_equal(batch.pixels[n], pixels)
        flips += flipped
        if flipped:
            assert captions.MODALITIES[ROWS[place].modality].mirror
            np.testing.assert_array_equal(batch.pixels[n], pixels[:, ::-1])
            fine = fine[:, ::-1]
        grid = ((fine.astype(np.float32) - mean) / sd).reshape(196, 40)
        np.testing.assert_allclose(batch.fine[n], grid[batch.keep[n]], rtol=1e-5, atol=1e-5)
    assert 0 < flips < 32


def test_second_views_show_the_same_places(material):
    """Their teacher's features are the same, patch by patch, mirrored or not; others' are not."""
    batch = loop.make_batch(material, loop.Plan(1, batch=32), 0, 20)
    np.testing.assert_array_equal(batch.coarse[24:], batch.coarse[:8])
    mirrored = (batch.keep[24:] != batch.keep[:8]).any(1)
    assert 0 < mirrored.sum() < 8
    assert not np.array_equal(batch.coarse[8:16], batch.coarse[:8])
    assert loop.mirrored(np.array([0, 13, 14, 195])).tolist() == [13, 0, 27, 182]


def test_all_patches_in_any_order_give_the_full_encoder(model):
    params = encoders.init(model, 0)
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.uniform(size=(2, 224, 224)), jnp.float32)
    order = np.stack([rng.permutation(196) for _ in range(2)])
    encode = jax.jit(lambda keep: encoders.encode_image(params, model, pixels, keep)[1])
    full, mixed = encode(np.tile(np.arange(196), (2, 1))), encode(order)
    np.testing.assert_allclose(mixed[:, 0], full[:, 0], atol=1e-4)
    np.testing.assert_allclose(mixed[0, 1:], full[0, 1:][order[0]], atol=1e-4)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_and_loads_elsewhere(
    tmp_path, monkeypatch, material, config, model, tokenizer_folder
):
    plan = loop.Plan(steps=6, batch=8, patches=12, rate=1.0, save_minutes=0.0)
    monkeypatch.setattr(loop, "LOGGED", 1)
    begin = loop.start(encoders.init(model, 0), model, 0)
    whole = loop.run(material, model, plan, begin, tmp_path / "whole.safetensors")
    lines = [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()]
    totals = [line["total"] for line in lines]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert np.mean(totals[-2:]) < np.mean(totals[:2])
    assert all(0 <= line["waiting"] <= 1 for line in lines)

    def interrupted(material, plan, number, kept):
        if number == 2:
            raise KeyboardInterrupt
        return make_batch(material, plan, number, kept)

    make_batch, path = loop.make_batch, tmp_path / "parts.safetensors"
    monkeypatch.setattr(loop, "make_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.run(material, model, plan, begin, path)
    monkeypatch.setattr(loop, "make_batch", make_batch)
    assert loop.restore(path, begin)[1].steps == 2
    path.write_bytes(path.read_bytes()[:1000])  # broken: the one before it is taken
    assert loop.restore(path, begin)[1].steps == 1
    resumed = loop.run(material, model, plan, begin, path)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))

    export.write_folder(tmp_path / "out", whole.average, config, tokenizer_folder, "# card")
    check_export(tmp_path / "out", jax.tree.map(np.asarray, whole.average), model, material)


def test_the_decayed_weights_are_exported_and_the_card_says_so(tmp_path, tokenizer_folder):
    entries = len(CLIPTokenizerFast.from_pretrained(tokenizer_folder))
    shape = encoders.make_config(entries, width=64, layers=2, heads=1)
    model = encoders.build(shape)
    state = loop.start(encoders.init(model, 0), model, 0)
    shutil.copytree(tokenizer_folder, tmp_path / "tokenizer")
    plan = {"width": 64, "layers": 2, "findings": True, "init": None, "seed": 0, "shards": 3}
    plan |= {"batch": 8, "phases": [[0, "Muon"]]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    counts = leaks.LeakCount("busi", 780, 10, 0.9, 2, 0.5)._asdict()
    sources = [["BRISC", "brain mri", "CC BY 4.0", 5]]
    (tmp_path / "leaks.json").write_text(json.dumps({"sources": sources, "sets": [counts]}))
    last = state._replace(params={**state.params, "clip": encoders.init(model, 1)})
    for name, done in (("checkpoint", 10), ("decayed", 30)):
        loop.save(tmp_path / f"{name}.safetensors", last, loop.Done(done, 60.0))
        if name == "decayed":
            (tmp_path / "decay.json").write_text(json.dumps({"from": 10, "steps": 20}))
        card.export_run(tmp_path, tmp_path / name, half=False)
        clip = checkpoint.load(str(tmp_path / name))
        wanted = state.average if name == "checkpoint" else last.params["clip"]
        for a, b in zip(jax.tree.leaves(clip.params), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(np.asarray(a), b)
        text = (tmp_path / name / "README.md").read_text()
        assert f"{done} steps, {8 * done} image views, 1 minutes" in text
        assert ("the last 20 steps: the rate falls to 0" in text) == (name == "decayed")
        assert ("Exported: the last weights." in text) == (name == "decayed")
        assert "| BRISC | brain mri | CC BY 4.0 | 5 |" in text
        assert "| busi | 780 | 10 | 0.900 | 2 | 0.500 |" in text


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
    last = jax.jit(lambda x: encoders.encode_image(params, model, x)[1])(grey)
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


class Net:
    """A PyTorch net of the teacher's shape with few channels, as `lite0.convert` reads it."""

    def __init__(self):
        rng, self.tensors = np.random.default_rng(0), {}
        widths = [4, 4, 4, 4, 4, 40, 8, 8, 8, 8, 8, 112, 8, 8, 8, 8, 8]

        def conv(name, norm, out, into, side):
            self.tensors[f"{name}.weight"] = rng.normal(size=(out, into, side, side)) / into**0.5
            for part in ("weight", "bias", "running_mean", "running_var"):
                self.tensors[f"{norm}.{part}"] = rng.uniform(0.5, 1.5, out)

        conv("_conv_stem", "_bn0", 4, 3, 3)
        for n, (into, out) in enumerate(zip(widths, widths[1:], strict=False)):
            block = f"_blocks.{n}"
            if n:
                conv(f"{block}._expand_conv", f"{block}._bn0", 2 * into, into, 1)
            conv(f"{block}._depthwise_conv", f"{block}._bn1", into * (1 + (n > 0)), 1, 3)
            conv(f"{block}._project_conv", f"{block}._bn2", out, into * (1 + (n > 0)), 1)
        conv("_conv_head", "_bn1", 1280, 8, 1)

    def state_dict(self):
        return {name: Tensor(x) for name, x in self.tensors.items()}


class Tensor(np.ndarray):
    def __new__(cls, x):
        return np.asarray(x, np.float32).view(cls)

    def numpy(self):
        return np.asarray(self)


def test_teacher_folds_its_normalisation_and_pads_as_tensorflow_does():
    net = Net()
    w, x = lite0.convert(net), np.random.default_rng(1).uniform(size=(1, 8, 8, 3))
    t = net.tensors
    plain = np.zeros((4, 4, 4))  # "SAME" at stride 2: nothing before, one row and column after
    padded = np.pad(x[0], ((0, 1), (0, 1), (0, 0)))
    for i, j in np.ndindex(4, 4):
        window = padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3]
        plain[i, j] = np.einsum("hwc,ochw->o", window, t["_conv_stem.weight"])
    scale = t["_bn0.weight"] / np.sqrt(t["_bn0.running_var"] + 1e-3)
    plain = (plain - t["_bn0.running_mean"]) * scale + t["_bn0.bias"]
    ours = jax.lax.conv_general_dilated(
        x.astype(np.float32), w["stem.kernel"], (2, 2), "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )  # fmt: skip
    np.testing.assert_allclose(np.asarray(ours[0]) + w["stem.bias"], plain, atol=1e-4)


@pytest.fixture(scope="module")
def source(tmp_path_factory, material):
    folder = tmp_path_factory.mktemp("pack")
    (folder / "pretrain" / "images").mkdir(parents=True)
    for n, row in enumerate(ROWS):
        picture = np.kron(np.random.default_rng(n).integers(0, 255, (14, 14)), np.ones((16, 16)))
        picture = Image.fromarray(picture.astype(np.uint8))
        picture.save(folder / "pretrain" / "images" / row.image)
    device.pack(folder / "pretrain", ROWS, material, Net(), folder / "pack.npz")
    return device.load(folder / "pack.npz")


def test_packed_batches_are_true(source, material):
    """Captions match what they are true of; second views show the same places of the same crop."""
    make = jax.jit(device.make_batch, static_argnums=(2, 3, 4, 5))
    key, size = jax.random.key(3), 256
    batch = make(source, key, size, 64, 20, "float32")
    place = jax.random.choice(jax.random.split(key, 7)[0], len(ROWS), (size,), p=source.chance)
    place = np.asarray(place.at[192:].set(place[:64]))
    texts = material.tokenizer.batch_decode(np.asarray(batch.captions), skip_special_tokens=True)
    true = {text: [ROWS[i].state == "normal" for i in place] for text in captions.ANY_NORMAL}
    true |= {text: [ROWS[i].state != "normal" for i in place] for text in captions.ANY_ABNORMAL}
    true |= {t: [ROWS[i].modality == "chest ct" for i in place] for t in ("chest ct", "a chest ct")}
    seen = [j for j, text in enumerate(texts) if text in true]
    assert len({texts[j] for j in seen}) > 5
    for j in seen:
        np.testing.assert_array_equal(batch.match[:, j], true[texts[j]], texts[j])
    assert (np.asarray(batch.match).diagonal() == 1).all()  # each is true of its own image
    first, again = np.asarray(batch.pixels[:64]), np.asarray(batch.pixels[192:])
    same = np.array([(a == b).all() for a, b in zip(first, again, strict=True)])
    turned = np.array([(a == b[:, ::-1]).all() for a, b in zip(first, again, strict=True)])
    assert (same | turned).all() and turned.any() and same.any()
    keep = np.where(turned[:, None], loop.mirrored(batch.keep[:64]), batch.keep[:64])
    np.testing.assert_array_equal(keep, batch.keep[192:])
    assert np.isfinite(batch.coarse).all() and batch.fine.shape == (256, 20, 40)


def test_crop_of_a_ramp_is_within_it_and_keeps_its_direction():
    ramp = np.tile(np.arange(224, dtype=np.uint8), (224, 1))
    seen = jax.vmap(device.crop, (None, 0))(
        jnp.asarray(ramp), jax.random.split(jax.random.key(0), 32)
    )
    slope = np.asarray(seen)[:, 80:144, 80:144]
    across = np.diff(slope, axis=2).mean((1, 2)) * 255
    down = np.diff(slope, axis=1).mean((1, 2)) * 255
    length = np.hypot(across, down)
    assert ((length > 0.5) & (length < 1.3)).all()  # at most the whole, at least 40%, of its width
    angles = np.rad2deg(np.arctan2(down, across))
    assert np.abs(angles).max() <= views.TURN * 1.6 and (np.abs(angles) < 0.5).mean() > 0.3


@pytest.mark.slow
def test_training_on_devices_learns_decays_and_resumes(tmp_path, monkeypatch, source, model):
    monkeypatch.setattr(device, "CHUNK", 2)
    plan = loop.Plan(steps=0, decay=2, batch=8, patches=196, rate=0.5)
    path, begin = tmp_path / "checkpoint.safetensors", loop.start(encoders.init(model, 0), model, 0)
    for _ in range(2):  # the second goes on from the first's checkpoint, not from its decay
        device.run(source, model, plan, begin, path, 1e-9)
    lines = [json.loads(s) for s in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 4, 6]
    assert lines[1]["rate"] == 0.5 and lines[3]["total"] < lines[0]["total"]
    assert all(0 <= line["share_of_peak"] < 2 for line in lines)
    assert loop.restore(path, begin)[1].steps == 4
    assert loop.restore(tmp_path / "decayed.safetensors", begin)[1].steps == 6


def test_the_plan_says_from_which_step_on_the_weights_were_others(tmp_path, monkeypatch):
    def phases(begun, *more):
        monkeypatch.setattr("sys.argv", ["x", f"--run={tmp_path}", "--stage=train", *more])
        pretrain_compact_clip.make_plan(pretrain_compact_clip.arguments(), 4, begun)
        return json.loads((tmp_path / "plan.json").read_text())["phases"]

    first = phases(0)
    assert first == phases(10) and [n for n, _ in first] == [0]
    later = phases(20, "--weight", "caption=0")
    assert later[0] == first[0] and later[1][0] == 20 and len(later) == 2
    assert " caption 0.1" in later[0][1] and " caption 0.1" not in later[1][1]
    assert phases(0, "--rate", "1") == [[0, first[0][1].replace("0.0008", "1")]]  # anew


def test_a_checkpoint_of_another_optimiser_is_refused(tmp_path, model):
    begin = loop.start(encoders.init(model, 0), model, 0)
    loop.save(tmp_path / "c.safetensors", begin._replace(moments=()), loop.Done(3, 1.0))
    with pytest.raises(SystemExit, match="another version of the training"):
        loop.restore(tmp_path / "c.safetensors", begin)
