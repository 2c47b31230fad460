"""Simulated images: determinism, exact masks, speckle statistics, the folder on disk."""

import numpy as np
import pytest
from PIL import Image

from medclip_jax.data import phantom, phantom_anatomy
from medclip_jax.errors import ConfigError, WorkdirError

MODALITIES = tuple(phantom.MODALITIES)


@pytest.mark.parametrize("modality", MODALITIES)
def test_same_seed_same_images_whatever_n(modality):
    images, masks = phantom.generate(modality, 4, 64, 7, np.array([True, False, True, True]))
    again, again_masks = phantom.generate(modality, 2, 64, 7, np.array([True, False]))
    np.testing.assert_array_equal(images[:2], again)
    np.testing.assert_array_equal(masks[:2], again_masks)
    other, _ = phantom.generate(modality, 2, 64, 8, np.array([True, False]))
    assert np.abs(other - again).mean() > 0.01
    assert np.abs(images[0] - images[2]).mean() > 0.01, "anatomy varies from image to image"


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("size", [48, (97, 131), 224])
def test_shape_range_and_masks_at_any_size(modality, size):
    images, masks = phantom.generate(modality, 5, size, 1, 0.4)
    height, width = (size, size) if isinstance(size, int) else size
    assert images.shape == masks.shape == (5, height, width)
    assert images.dtype == np.float32 and masks.dtype == bool
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    diseased = masks.any((1, 2))
    assert diseased.sum() == 2
    assert np.all(masks[diseased].mean((1, 2)) < 0.15)


@pytest.mark.parametrize("modality", MODALITIES)
def test_every_lesion_has_pixels_that_differ_from_the_healthy_twin(modality):
    n = 24
    sick, masks = phantom.generate(modality, n, 96, 3, 1.0)
    healthy, none = phantom.generate(modality, n, 96, 3, 0.0)
    assert not none.any() and masks.any((1, 2)).all()
    for a, b, mask in zip(sick, healthy, masks, strict=True):
        assert (a != b)[mask].mean() > 0.9, "the mask marks what changed"


def test_ultrasound_lesion_is_darker_and_only_its_shadow_lies_outside():
    sick, masks = phantom.generate("ultrasound", 16, 160, 5, 1.0)
    healthy, _ = phantom.generate("ultrasound", 16, 160, 5, 0.0)
    for a, b, mask in zip(sick, healthy, masks, strict=True):
        assert np.all(a[mask] <= b[mask])
        assert (b - a)[mask].mean() > 0.1
        rows, columns = np.nonzero(mask)
        np.testing.assert_array_equal(a[: rows.min()], b[: rows.min()])
        far = np.abs(np.arange(160)[:, None] - np.unique(columns)[None]).min(1) > 10
        np.testing.assert_array_equal(a[:, far], b[:, far])


def test_xray_changes_nothing_outside_the_mask_and_brightens_inside():
    sick, masks = phantom.generate("xray", 16, 128, 5, 1.0)
    healthy, _ = phantom.generate("xray", 16, 128, 5, 0.0)
    np.testing.assert_array_equal(sick[~masks], healthy[~masks])
    assert np.mean([(a - b)[m].mean() for a, b, m in zip(sick, healthy, masks, strict=True)]) > 0.05


def test_mri_background_is_rician_noise_and_lesions_lie_in_the_brain():
    images, masks = phantom.generate("mri", 12, 128, 2, 1.0)
    corners = images[:, :12, :12].reshape(12, -1)
    ratio = corners.mean(1) / corners.std(1)  # no signal: Rayleigh, mean / sd = 1.913
    np.testing.assert_allclose(ratio.mean(), np.sqrt(np.pi / (4 - np.pi)), rtol=0.05)
    assert not masks[:, :12].any() and not masks[:, :, :12].any()


def test_speckle_is_rayleigh():
    rng = np.random.default_rng(0)
    envelope = np.stack([phantom_anatomy.speckle(rng, (224, 224)) for _ in range(4)])
    assert envelope.mean() / envelope.std() == pytest.approx(np.sqrt(np.pi / (4 - np.pi)), rel=0.02)
    # P(e > t) = exp(-t^2) at unit mean square
    for t in (0.5, 1.0, 1.5):
        assert (envelope > t).mean() == pytest.approx(np.exp(-(t**2)), abs=0.012)
    decibel = 20 * np.log10(envelope[envelope > 0])
    assert decibel.std() == pytest.approx(5.57, rel=0.03), "log-compressed speckle: sd 5.57 dB"


def test_unusable_arguments_are_named():
    with pytest.raises(ConfigError, match="'ct'"):
        phantom.generate("ct", 1, 64, 0)
    with pytest.raises(ConfigError, match="32"):
        phantom.generate("mri", 1, 16, 0)


COUNTS = {"n_train": 3, "n_test_good": 2, "n_test_lesion": 2}


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_folder_layout_holds_the_generated_pixels(tmp_path):
    root = phantom.write_folder(tmp_path / "a" / "set", "xray", 4, 64, **COUNTS)
    names = {k.rsplit("/", 1)[0] for k in files(root) if "/" in k}
    assert names == {"train/good", "test/good", "test/lesion", "ground_truth/lesion"}
    assert len(list((root / "train/good").iterdir())) == 3
    images, masks = phantom.generate("xray", 7, 64, 4, np.arange(7) >= 5)
    for i in (5, 6):
        pixels = np.asarray(Image.open(root / f"test/lesion/{i:04d}.png"))
        mask = np.asarray(Image.open(root / f"ground_truth/lesion/{i:04d}_mask.png"))
        np.testing.assert_allclose(pixels / 255, images[i], atol=0.5 / 255 + 1e-6)
        np.testing.assert_array_equal(mask, np.where(masks[i], 255, 0))
    assert not list(root.parent.glob(".*")), "no temporary folder is left"


def test_folder_is_written_once_and_never_over_other_data(tmp_path):
    root = phantom.write_folder(tmp_path / "set", "mri", 4, 48, **COUNTS)
    before, stamps = files(root), {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    phantom.write_folder(root, "mri", 4, 48, **COUNTS)
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == stamps
    with pytest.raises(WorkdirError, match="other data"):
        phantom.write_folder(root, "mri", 5, 48, **COUNTS)
    assert files(root) == before


def test_interrupted_folder_is_redone(tmp_path, monkeypatch):
    whole = files(phantom.write_folder(tmp_path / "whole", "mri", 4, 48, **COUNTS))
    saved = Image.Image.save
    calls = []

    def stop_at_third(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return saved(self, *args, **kwargs)

    root = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", stop_at_third)
        with pytest.raises(KeyboardInterrupt):
            phantom.write_folder(root, "mri", 4, 48, **COUNTS)
    assert not root.exists() and not list(tmp_path.glob(".set-*"))
    assert files(phantom.write_folder(root, "mri", 4, 48, **COUNTS)) == whole
