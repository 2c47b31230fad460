"""The leak check: images issued anew are seen through what was done to them; others are not."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter
from pretrain import leaks
from scipy import ndimage

from medclip_jax.data import catalog


def person(seed: int) -> Image.Image:
    """One of many alike bodies on black: outline and organs nearly the same, texture one's own."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1:1:170j, -1:1:150j]
    shape = 0.8 + 0.02 * rng.normal(size=2)
    inside = (x / shape[0]) ** 2 + (y / shape[1]) ** 2 < 1
    a, b, c, d = 0.12 * rng.normal(size=4)
    organs = 0.35 + 0.3 * (np.hypot(x - 0.25 + a, y + 0.1 + b) < 0.3 + c / 2)
    organs = organs + 0.2 * (np.hypot(x + 0.3 + c, y + d) < 0.25 + a / 2)
    texture = sum(ndimage.gaussian_filter(rng.normal(size=x.shape), s) * s for s in (1.5, 3))
    values = inside * np.clip(organs + 0.15 * texture, 0.15, 1)
    return Image.fromarray((255 * values).astype(np.uint8))


def of_values(change):
    def changed(image):
        values = change(np.asarray(image, np.float32) / 255)
        return Image.fromarray((255 * np.clip(values, 0, 1)).astype(np.uint8))

    return changed


def cropped(image, share=0.86):
    w, h = image.size
    x, y = w * (1 - share) / 2, h * (1 - share) / 2
    return image.crop((int(x), int(y), int(w - x), int(h - y)))


def to_body(image):
    return image.crop(leaks.body(np.asarray(image, np.float32)))


def padded(image):
    out = Image.new("L", (image.width + 70, image.height + 30), 0)
    out.paste(image, (50, 10))
    return out


def jpeg(image):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    return Image.open(file).convert("L")


def mirrored(image):
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def noisy(x):
    return x + np.random.default_rng(9).normal(0, 0.04, x.shape)


KINDS = {
    "encoded again": jpeg,
    "stretched": lambda image: image.resize((224, 224)),
    "cropped to the body": to_body,
    "cropped further": lambda image: cropped(to_body(image)),
    "framed": padded,
    "mirrored": mirrored,
    "turned by 16": lambda image: image.rotate(16, Image.Resampling.BILINEAR, expand=True),
    "turned by -9": lambda image: image.rotate(-9, Image.Resampling.BILINEAR),
    "other contrast": of_values(lambda x: np.where(x > 0, 0.7 * x**0.6 + 0.1, 0)),
    "blurred and noisy": lambda image: of_values(noisy)(image.filter(ImageFilter.GaussianBlur(1))),
    "all at once": lambda image: jpeg(
        of_values(lambda x: x**1.4)(to_body(mirrored(image).rotate(12, expand=True)))
    ).resize((224, 224)),
}


@pytest.fixture(scope="module")
def checked(tmp_path_factory):
    """The check on planted copies of persons 0 and 1, and on as many others."""
    root = tmp_path_factory.mktemp("leaks")
    train, evaluation = root / "train", root / "evaluation"
    for folder in (train, evaluation):
        folder.mkdir()
    for seed in range(8):
        person(seed).save(evaluation / f"{seed}.png")
    person(100).save(evaluation / "100_mask.png")  # masks are no images
    for seed in (0, 1):
        for kind, change in KINDS.items():
            change(person(seed)).save(train / f"copy {seed} {kind}.png")
    for seed in range(100, 122):
        person(seed).save(train / f"other {seed}.png")
    paths = sorted(train.iterdir())
    keep, (count,) = leaks.leak_check(paths, {"set": evaluation}, root / "cache")
    return {path.stem: bool(k) for path, k in zip(paths, keep, strict=True)}, count


@pytest.mark.parametrize("kind", KINDS)
def test_planted_copies_are_found(checked, kind):
    assert [checked[0][f"copy {seed} {kind}"] for seed in (0, 1)] == [False, False]


def test_others_are_kept_and_counted(checked):
    keep, count = checked
    assert all(k for name, k in keep.items() if name.startswith("other"))
    assert (count.evaluation_images, count.leaks) == (8, 2 * len(KINDS))
    assert count.candidates >= 2 * len(KINDS) and count.highest < leaks.LIMIT


def test_constant_image_is_no_copy(tmp_path):
    for folder in ("train", "set"):
        (tmp_path / folder).mkdir()
        Image.new("L", (50, 50), 90).save(tmp_path / folder / "flat.png")
    keep, _ = leaks.leak_check(
        [tmp_path / "train" / "flat.png"], {"set": tmp_path / "set"}, tmp_path / "cache"
    )
    assert keep.tolist() == [True]


def test_no_tone_changes_a_thumbnail():
    image, pose = person(3), leaks.Pose()
    seen = leaks.thumbnail(KINDS["other contrast"](image), pose)
    assert leaks.thumbnail(image, pose) @ seen > 0.98


def test_collections_used_for_evaluation_are_named():
    assert catalog.seen_collections(["oasis", "kermany", "navoneel"]) == {
        "brain_mri": "navoneel",
        "chest_xray": "kermany",
    }
    assert catalog.seen_collections(["brisc", "oai_kl"]) == {}  # other patients, declared
    assert catalog.with_role("report") == ("mammo_mias", "blood_rbc", "spine_xr")
    assert "pretrain" not in catalog.with_role("development", "report")


@pytest.mark.slow
def test_different_patients_in_one_position_are_no_copies():
    """A set whose images resemble each other raises its limit; exact copies in it do not."""
    rng = np.random.default_rng(0)
    shared = np.asarray(person(5), np.float32)

    def patient():
        own = 12 * ndimage.gaussian_filter(rng.normal(size=shared.shape), 3) / 0.1
        return Image.fromarray(np.clip(shared + own, 0, 255).astype(np.uint8))

    patients = [patient() for _ in range(6)]
    limit = leaks.limit_of(patients)
    assert leaks.LIMIT < limit < leaks.COPY
    assert leaks.limit_of([*patients, patients[0]]) == pytest.approx(limit, abs=0.05)
    assert leaks.limit_of([person(n) for n in range(6)]) == leaks.LIMIT
