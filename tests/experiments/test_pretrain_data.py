"""What pre-training shows: captions, tokenizer, views."""

import numpy as np
from pretrain import captions, loop, tokens, views
from transformers import CLIPTokenizer, CLIPTokenizerFast

from tests.experiments.conftest import ROWS

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
