"""The layouts of the shipped data sets: on folders the tests make, and on the real ones."""

import runpy
from pathlib import Path

import pytest

from medclip_jax.data import datasets
from medclip_jax.data.citations import ABOUT
from medclip_jax.data.presets import PRESETS
from medclip_jax.errors import DataError

from .test_datasets import REAL, cache, no_named_root, png  # noqa: F401

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def brain(tmp_path) -> Path:
    root = tmp_path / "data" / "brain_mri"
    for n in range(6):
        png(root / "no" / f"{n} no.jpg", n)
        png(root / "yes" / f"Y{n}.JPG", 50 + n)
    return root


@pytest.fixture
def chest(tmp_path) -> Path:
    root = tmp_path / "data" / "chest_xray"
    for n in range(4):
        for i, place in enumerate(("train/NORMAL", "test/NORMAL", "test/PNEUMONIA")):
            png(root / place / f"IM-{n}.jpeg", 10 * n + i)
    png(root / "train" / "PNEUMONIA" / "person1.jpeg", 99)
    png(root / "val" / "NORMAL" / "IM-9.jpeg", 98)
    return root


def test_brain_mri_records(brain, cache):  # noqa: F811
    records = datasets.load("brain_mri", brain, cache)
    rows = {r.id: (r.label, r.part, r.masks) for r in records}
    assert rows["no/3 no.jpg"] == (0, "", ()) and rows["yes/Y3.JPG"] == (1, "", ())
    drawn = datasets.split(records, 2, 0, pool_size=4)
    assert [sum(r.label == label for r in drawn.test) for label in (0, 1)] == [2, 6]
    assert all(r.label == 0 for r in drawn.support)


def test_chest_xray_supports_come_from_train_and_test_is_the_archives(chest, cache):  # noqa: F811
    records = datasets.load("chest_xray", chest, cache)
    drawn = datasets.split(records, 4, 0)
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
def test_missing_sets_say_where_they_come_from(name, tmp_path, cache):  # noqa: F811
    with pytest.raises(DataError, match=rf"below {tmp_path}.*{name}.*data\.root"):
        datasets.load(name, tmp_path, cache)
    with pytest.raises(DataError, match=r"no folder was named.*https://.*unpack"):
        datasets.load(name, None, cache)


def test_builders_ask_for_a_download_by_hand(brain, chest, tmp_path):
    from medclip_jax.data import builders

    info = builders.BrainMri(data_dir=str(tmp_path / "a")).info
    assert ABOUT["brain_mri"].licence in info.redistribution_info.license and info.citation
    for name, place, count in (("brain_mri", brain, 12), ("chest_xray", chest, 13)):
        builder = builders.BUILDERS[name](data_dir=str(tmp_path / "a"))
        assert "unpack" in builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        manual = builders.tfds.download.DownloadConfig(manual_dir=str(place))
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
    from medclip_jax.data import builders

    assert set(datasets.LAYOUTS) == set(builders.BUILDERS) == set(ABOUT)
    assert set(PRESETS) == (set(datasets.LAYOUTS) - {"folder"}) | set(datasets.PHANTOMS)


def has(name: str) -> bool:
    try:
        return bool(datasets.LAYOUTS[name](REAL).examples)
    except DataError:
        return False


@pytest.mark.parametrize(
    "name, pool, test", [("brain_mri", 98, [66, 155]), ("chest_xray", 64, [234, 390])]
)
def test_real_counts(name, pool, test, cache):  # noqa: F811
    if not has(name):
        pytest.skip(f"no {name} below {REAL}; set $MEDCLIP_DATA")
    records = datasets.load(name, REAL, cache)
    assert sum(r.label == 0 and r.part != "test" for r in records) == pool
    for k in (4, 32):
        drawn = datasets.split(records, k, seed=0)
        assert len(drawn.support) == k
        assert [sum(r.label == label for r in drawn.test) for label in (0, 1)] == test
