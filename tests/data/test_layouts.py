"""The layouts of the shipped data sets: on folders the tests make, and on the real ones."""

import hashlib
import runpy
from pathlib import Path

import pytest

from medclip_jax.data import datasets, layouts, splits
from medclip_jax.data.catalog import ABOUT, PRESETS
from medclip_jax.errors import DataError
from medclip_jax.io import read
from tests.support.folders import ROOT, pair, real, write_brain, write_chest

CONFIGS = ROOT / "configs"


@pytest.fixture
def brain(tmp_path) -> Path:
    return write_brain(tmp_path / "data" / "brain_mri")


@pytest.fixture
def chest(tmp_path) -> Path:
    return write_chest(tmp_path / "data" / "chest_xray")


def test_busi_records(busi, cache):
    records = datasets.load("busi", busi, cache)
    assert [r.id for r in records[:6]] == [f"benign/benign ({n}).png" for n in range(1, 6)] + [
        "malignant/malignant (1).png"
    ]
    assert records[-1].id == "normal/normal (12).png"  # natural order: 12 after 2
    assert [sum(r.label == label for r in records) for label in (0, 1)] == [12, 8]
    assert all(r.part == "" and r.path.is_file() and r.path.is_absolute() for r in records)
    two = records[1]
    assert [m.name for m in two.masks] == ["benign (2)_mask.png", "benign (2)_mask_1.png"]
    assert all(r.sha256 == hashlib.sha256(r.path.read_bytes()).hexdigest() for r in records)


def test_busi_is_found_one_or_two_levels_below(busi, cache):
    (busi.parent / "busi").mkdir()
    expected = datasets.load("busi", busi, cache)
    assert datasets.load("busi", busi.parent, cache) == expected
    busi.rename(busi.parent / "busi" / busi.name)
    above = datasets.load("busi", busi.parent, cache)
    assert [r.id for r in above] == [r.id for r in expected]


def test_root_from_the_environment(busi, cache, monkeypatch):
    monkeypatch.setenv("MEDCLIP_DATA", str(busi))
    assert datasets.load("busi", None, cache) == datasets.load("busi", busi, cache)


def test_folder_records(folder, cache):
    records = datasets.load("folder", folder, cache)
    rows = {r.id: (r.label, r.part, len(r.masks)) for r in records}
    assert len(rows) == 24
    assert rows["train/good/3.png"] == (0, "train", 0)
    assert rows["test/good/3.png"] == (0, "test", 0)
    assert rows["test/crack/3.png"] == (1, "test", 1)
    assert rows["test/stain/3.png"] == (1, "test", 0)


def empty_files(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_bmads_layout_is_read_as_its_archives_have_it(tmp_path):
    both = [f"test/{kind}/{part}/{i}.png" for kind in ("good", "Ungood") for i in (1, 2)
            for part in ("img", "label")]  # fmt: skip
    root = empty_files(tmp_path, "train/good/1.png", "valid/good/img/1.png", *both)
    layout = layouts.folder(root)
    assert not layout.problems
    assert {e.id: (e.label, e.part, e.masks) for e in layout.examples} == {
        "train/good/1.png": (0, "train", ()),
        "test/good/img/1.png": (0, "test", ()),
        "test/good/img/2.png": (0, "test", ()),
        "test/Ungood/img/1.png": (1, "test", ("test/Ungood/label/1.png",)),
        "test/Ungood/img/2.png": (1, "test", ("test/Ungood/label/2.png",)),
    }
    (root / "test/Ungood/label/2.png").unlink()
    assert layouts.folder(root).problems == (
        "test/Ungood/img/2.png has no mask test/Ungood/label/2.png",
    )


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("test/crack/1/a.png", "test/crack/1/a.png is not in test/crack: move it there"),
        ("test/crack/1/2/a.png", "test/crack/1/2/a.png is not in test/crack: move it there"),
        ("train/good/old/a.png", "train/good/old/a.png is not in train/good"),
        ("test/normal/a.png", "test/normal would count as abnormal"),
        ("test/stain/b.png", "test/stain/b.png is not in test/stain/img"),
        ("test/stain/img/1/b.png", "test/stain/img/1/b.png is not in test/stain/img"),
        ("train/a.png", "train/a.png is in no folder of a kind"),
        ("test/a.dcm", "test/a.dcm is in no folder of a kind"),
        ("test/a.IMA", "test/a.IMA is in no folder of a kind"),
        ("labels/stain/1.hdr", "folder labels is unread"),
        ("ground_truth/1_mask.png", "ground_truth/1_mask.png is in no folder of a kind"),
        ("train/good/1_mask.png", "train/good/1_mask.png is a mask: take it out"),
        ("test/stain/img/1_mask_2.png", "test/stain/img/1_mask_2.png is a mask: take it out"),
        (
            "masks/stain/1.png",
            "folder masks is unread: use train/good, test/<kind>, ground_truth/<kind>",
        ),
        ("Test/crack/1.png", "folder Test is unread"),
        ("ground truth/stain/1_mask.PNG", "folder ground truth is unread"),
        ("ground_truth/stain/1_mask_left.png", "ground_truth/stain/1_mask_left.png is no mask's"),
        ("ground_truth/stain/1_left.png", "ground_truth/stain/1_left.png is no mask's name"),
        ("ground_truth/Stain/1.png", "mask ground_truth/Stain/1.png has no image"),
        ("ground_truth/stain", "ground_truth/stain is in no folder of a kind"),
    ],
)
def test_images_that_nobody_would_read_are_named(tmp_path, name, problem):
    layout = layouts.folder(empty_files(tmp_path, "train/good/1.png", "test/stain/img/1.png", name))
    assert [x for x in layout.problems if x.startswith(problem)]


def test_links_to_a_folder_above_are_not_followed(tmp_path):
    """Two to a folder of its own would be listed in 2^40 ways."""
    root = empty_files(tmp_path, "train/good/1.png", "test/stain/img/1.png", "train/good/x/2.png")
    for i, folder in enumerate((*["train/good"] * 3, "train/good/x", "test/stain")):
        (root / folder / f"loop{i}").symlink_to(root / "train" / "good")
    found = layouts.folder(root).problems
    assert found[0] == "train/good/x/2.png is not in train/good: move it there"
    # what a link elsewhere leads to is seen
    assert "test/stain/loop4/1.png is not in test/stain/img: move it there" in found
    assert len(found) < 5


def test_what_is_no_image_of_the_layout_is_passed_over(tmp_path):
    others = ("test/labels.csv", "labels/a.csv", "valid/good/1.png", "raw/1.png")
    root = empty_files(tmp_path, "train/good/1.png", "test/stain/1.png", *others)
    assert not layouts.folder(root).problems


@pytest.mark.parametrize("image", ["1.2.840.113", "a.NII.GZ", "a.nii.gz", "us.mr", "a.b.png"])
def test_a_mask_has_the_name_of_its_image_whatever_that_ends_in(tmp_path, image):
    stem = image if image.startswith("1.") else image.rpartition(".")[0].removesuffix(".NII")
    mask = f"ground_truth/stain/{stem.removesuffix('.nii')}_mask.png"
    names = [
        f"test/stain/{image}",
        "test/stain/1.2.840.114",
        "ground_truth/stain/1.2.840.114_mask.png",
    ]
    layout = layouts.folder(empty_files(tmp_path, "train/good/1.png", mask, *names))
    assert not layout.problems
    assert (mask,) in [e.masks for e in layout.examples if e.id == f"test/stain/{image}"]


def sha_of_pair(header: Path) -> str:
    """SHA-256 of the two files' hashes, as of a DICOM series."""
    both = [hashlib.sha256(p.read_bytes()) for p in (header, header.with_suffix(".img"))]
    return hashlib.sha256(" ".join(x.hexdigest() for x in both).encode()).hexdigest()


def test_a_nifti_pair_is_one_image_known_by_both_files(tmp_path, cache):
    kinds = ("train/good", "test/good", "test/mass")
    paths = [pair(tmp_path / "mine" / kind / str(i), 3 * n + i) for n, kind in enumerate(kinds)
             for i in range(3)]  # fmt: skip
    assert len({path.read_bytes() for path in paths}) == 1  # equal headers
    records = datasets.load("folder", tmp_path / "mine", cache)
    assert {r.path for r in records} == set(paths) and layouts.unique(records) == list(records)
    assert all(r.sha256 == sha_of_pair(r.path) for r in records)
    assert len(list(read.read_all(records, 8))) == 9  # none is taken for changed
    (one, *rest) = datasets.healthy_folder(paths[0].parent)
    assert len(rest) == 2 and one.sha256 == sha_of_pair(paths[0])
    pair(paths[0], 99)  # other voxels, the same header
    again = datasets.load("folder", tmp_path / "mine", cache)
    changed = [r.path for r, old in zip(again, records, strict=True) if r.sha256 != old.sha256]
    assert changed == [paths[0]]
    with pytest.raises(DataError, match=r"0\.hdr was changed while it was read"):
        list(read.read_all(records, 8))
    paths[0].with_suffix(".img").unlink()
    with pytest.raises(DataError, match=r"0\.img cannot be reached \(No such file"):
        datasets.load("folder", tmp_path / "mine", cache)


def test_voxels_without_their_header_are_named(tmp_path, cache):
    """Not passed over in silence, whatever the case of the letters."""
    pair(tmp_path / "a", 0).unlink()
    header = pair(tmp_path / "b", 1)
    header.with_suffix(".img").rename(tmp_path / "B.IMG")
    header.rename(tmp_path / "B.HDR")
    assert [e.id for e in layouts.healthy(tmp_path).examples] == ["B.HDR", "a.img"]
    with pytest.raises(DataError, match=r"1 problem.*a\.hdr does not exist"):
        datasets.healthy_folder(tmp_path)


def test_healthy_images_in_folders_below_are_named_but_bmads_are_read(tmp_path):
    """They were left out of `calibration.extra` without a line."""
    root = empty_files(
        tmp_path, "more/1.png", "more/old/2.png", "good/img/1.png", "good/label/1.png"
    )
    found = layouts.healthy(root / "more")
    assert found.problems == ("more/old/2.png is not in more: move it there",)
    found = layouts.healthy(root / "good")
    assert [e.id for e in found.examples] == ["img/1.png"] and not found.problems


def test_every_kind_of_file_that_is_read_is_looked_for():
    assert {Path(f"a{ending}").suffix for ending in read.SUFFIXES} == set(layouts.USUAL)


def test_good_is_healthy_however_it_is_spelt(tmp_path):
    root = empty_files(tmp_path, "train/good/1.png", "test/Good/1.png")
    assert [e.label for e in layouts.folder(root).examples] == [0, 0]


def test_natural_order_is_total_and_numeric():
    names = ["b2", "a10", "a2", "a02", "10", "9", "a", ""]
    assert sorted(names, key=layouts.natural) == ["", "9", "10", "a", "a02", "a2", "a10", "b2"]


def test_brain_mri_records(brain, cache):
    records = datasets.load("brain_mri", brain, cache)
    rows = {r.id: (r.label, r.part, r.masks) for r in records}
    assert rows["no/3 no.jpg"] == (0, "", ()) and rows["yes/Y3.JPG"] == (1, "", ())
    drawn = splits.split(records, 2, 0, pool_size=4)
    assert [sum(r.label == label for r in drawn.test) for label in (0, 1)] == [2, 6]
    assert all(r.label == 0 for r in drawn.support)


def test_chest_xray_supports_come_from_train_and_test_is_the_archives(chest, cache):
    records = datasets.load("chest_xray", chest, cache)
    drawn = splits.split(records, 4, 0)
    assert {r.path.parent for r in drawn.support} == {chest / "train" / "NORMAL"}
    assert sorted(r.id.rpartition("/")[0] for r in drawn.test) == (
        ["test/NORMAL"] * 4 + ["test/PNEUMONIA"] * 4
    )


@pytest.mark.parametrize(
    "name, inner", [("brain_mri", "brain_tumor_dataset"), ("chest_xray", "chest_xray")]
)
def test_root_may_stand_one_or_two_levels_above(name, inner, brain, chest):
    place = {"brain_mri": brain, "chest_xray": chest}[name]
    listed = datasets.LAYOUTS[name](place).examples
    assert datasets.LAYOUTS[name](place.parent).examples == listed
    place.rename(place.parent / "aside")
    (place.parent / name).mkdir()
    (place.parent / "aside").rename(place.parent / name / inner)
    for root in (place.parent / name, place.parent):
        assert datasets.LAYOUTS[name](root) == (place.parent / name / inner, listed, ())


@pytest.mark.parametrize("name", ["brain_mri", "chest_xray"])
def test_missing_sets_say_where_they_come_from(name, tmp_path, cache):
    with pytest.raises(DataError, match=rf"below {tmp_path}.*{name}.*data\.root"):
        datasets.load(name, tmp_path, cache)
    with pytest.raises(DataError, match=r"no folder was named.*https://.*unpack"):
        datasets.load(name, None, cache)


def test_builders_ask_for_a_download_by_hand(brain, chest, tmp_path):
    from medclip_jax.data import tfds_builders

    info = tfds_builders.BrainMri(data_dir=str(tmp_path / "a")).info
    assert ABOUT["brain_mri"].licence in info.redistribution_info.license and info.citation
    for name, place, count in (("brain_mri", brain, 12), ("chest_xray", chest, 13)):
        builder = tfds_builders.BUILDERS[name](data_dir=str(tmp_path / "a"))
        assert "unpack" in builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        manual = tfds_builders.tfds.download.DownloadConfig(manual_dir=str(place))
        builder.download_and_prepare(download_config=manual)
        assert len(builder.as_data_source(split="full")) == count


@pytest.mark.parametrize("name", ["busi", "brain_mri", "chest_xray", "phantom"])
def test_config_files_take_their_texts_from_the_presets(name):
    c = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"]("k=4,root=/data")
    assert (c.k, c.data.root) == (4, "/data")
    assert c.data.name in (*datasets.LAYOUTS, *datasets.PHANTOMS)
    for field, value in PRESETS[c.data.name].items():
        assert c.data[field] == value


def test_every_data_set_has_its_texts():
    from medclip_jax.data import tfds_builders

    assert set(datasets.LAYOUTS) == set(tfds_builders.BUILDERS) == set(ABOUT)
    assert set(PRESETS) == (set(datasets.LAYOUTS) - {"folder"}) | set(datasets.PHANTOMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, pool, test", [("brain_mri", 98, [66, 155]), ("chest_xray", 64, [234, 390])]
)
def test_real_counts(name, pool, test, cache):
    records = datasets.load(name, real(name), cache)
    assert sum(r.label == 0 and r.part != "test" for r in records) == pool
    for k in (4, 32):
        drawn = splits.split(records, k, seed=0)
        assert len(drawn.support) == k
        assert [sum(r.label == label for r in drawn.test) for label in (0, 1)] == test


@pytest.mark.slow
def test_real_busi_counts(cache):
    records = datasets.load("busi", real("busi"), cache)
    kinds = [r.id.split("/")[0] for r in records]
    counts = {kind: kinds.count(kind) for kind in layouts.BUSI_LABELS}
    assert counts == {"benign": 437, "malignant": 210, "normal": 133}
    assert sum(len(r.masks) for r in records) == 798
    for k in (4, 32):
        drawn = splits.split(records, k, seed=0)
        assert len(drawn.support) == k
        assert [sum(r.label == label for r in drawn.test) for label in (0, 1)] == [101, 647]
    duplicates = {r.id for r in records if r.sha256 == records[432].sha256}
    assert duplicates == {"benign/benign (433).png", "malignant/malignant (145).png"}
