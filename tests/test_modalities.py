"""Configs that leave a modality out, and BMAD's: what they name, and what is refused."""

import importlib.util

import pytest

from medclip_jax import build, config
from medclip_jax.data import catalog, layouts, splits
from medclip_jax.data.layouts import Record, Split
from medclip_jax.errors import ConfigError, DataError
from tests.support.paths import ROOT


def get_config(name, arg):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize(
    "target, name, left_out",
    [
        ("oct", "oct_mx", {"oct_mx"}),
        ("busi", "busi", {"busi", "gallbladder_us"}),
        ("knee_xr", "knee_xr", {"knee_xr", "chest_xray"}),
        ("lung", "lung_ct", {"lung_ct"}),
    ],
)
def test_a_target_is_learned_from_every_other_modality(target, name, left_out):
    c = config.resolve(get_config("meta", f"target={target},k=8"))
    assert c.data.name == name and c.k == 8 and c.branches == ("meta",)
    assert set(c.meta.sources) == set(catalog.with_role("development")) - left_out
    others = build.auxiliary_datasets(c)
    assert [o.name for o in others] == list(c.meta.sources)
    assert {o.words["modality"] for o in others}.isdisjoint({c.data.modality})
    assert set(catalog.with_role("report")).isdisjoint(c.meta.sources)


@pytest.mark.parametrize(
    "arg", ["", "k=8", "target=", "target=none", "target=mammo_mias", "target=b"]
)
def test_an_unclear_target_is_refused(arg):
    with pytest.raises(ConfigError, match="target=NAME first, one of busi"):
        get_config("meta", arg)


@pytest.mark.parametrize(
    "modality, source",
    [
        ("breast ultrasound", "busi"),
        ("thyroid sonography", "gallbladder_us=DIR"),
        ("Hand Radiograph", "knee_xr"),
        ("abdominal computed tomography", "lung_ct"),
        ("Retinal  OCT", "oct_mx"),
        ("anything", "folder=DIR"),  # of whose modality nothing is known
    ],
)
def test_a_source_of_the_targets_modality_is_refused(modality, source):
    c = get_config("meta", "target=derm,k=8")
    c.data.modality, c.meta.sources = modality, ("fundus_mx", source)
    with pytest.raises(ConfigError, match="a target's modality is never learned from"):
        build.auxiliary_datasets(c)
    c.meta.sources = ("fundus_mx", "histo_lung")
    assert len(build.auxiliary_datasets(c)) == 2


@pytest.mark.parametrize(
    "fields, said",
    [
        ({"k": 3}, "meta needs k=4 or more"),
        ({"score.tiles": 2}, "no score.tiles"),
        ({"memory_encoder": "efficientnet-lite0"}, "no score.tiles, model.refine, memory_encoder"),
        ({"branches": ("meta", "meta")}, "give any of .* once"),
        ({"branches": ("meta", "learned")}, "or branch learned"),
        ({"k": 0}, "meta.sources goes with the branch meta, training and k=4 or more"),
        ({"method": "memory"}, "meta.sources goes with the branch meta, training"),
        ({"meta.data": ("busi",)}, "meta.data has sets beside meta.sources: leave it empty"),
        ({"teacher": "elsewhere"}, "teacher .* leave config.meta.data and sources empty"),
        (
            {"meta.sources": ("busi", "busi")},
            "config.meta.sources has a data set twice: give each once",
        ),
        (
            {"meta.sources": ("busi=a", "busi=b", "busi=a")},
            "config.meta.sources has a data set twice",
        ),
        (
            {"meta.sources": ("busi", "spine_xr")},
            "config.meta.sources has spine_xr, whose labels are for final scores alone",
        ),
        ({"branches": ("memory",)}, "meta.sources goes with the branch meta"),
        ({"meta.sources": (), "learner": "maml"}, "meta.sources goes with the branch meta"),
        ({"learner": "maml_pp", "meta.inner_steps": 0}, "maml_pp weighs inner steps"),
        (
            {"meta.sources": (), "branches": ("learned",), "learner": "reptile"},
            "needs meta.sources",
        ),
        ({"meta.sources": ("nowhere",)}, "config.meta.sources has 'nowhere': choose any of"),
    ],
)
def test_what_cannot_be_combined(fields, said):
    c = get_config("meta", "target=oct,k=8")
    c.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError, match=said):
        build.auxiliary_datasets(config.resolve(c))


def test_an_image_of_the_target_is_never_a_source(tmp_path):
    def record(name, label=0, part="train"):
        return Record(name, label, part, tmp_path / name, (), name)

    records = [record("a"), record("b"), record("c", 1, "test"), record("d", 0, "test")]
    healthy, abnormal = splits.source(records, Split((), ()), 5, 5)
    assert sorted(r.id for r in healthy) == ["a", "b"] and [r.id for r in abnormal] == ["c"]
    for side in ((record("b"),), ()), ((), (record("c", 1),)):
        with pytest.raises(DataError, match="byte for byte: leave that source out"):
            splits.source(records, Split(*side), 5, 5)


@pytest.mark.parametrize(
    "name, folder",
    [
        *(("brain", "Brain_AD"), ("liver", "Liver_AD"), ("resc", "RetinaRESC_AD")),
        *(("oct2017", "RetinaOCT2017_AD"), ("chest", "Chest_AD")),
        ("histopathology", "Histopathology_AD"),
    ],
)
def test_bmads_sets_as_their_archives_unpack(tmp_path, monkeypatch, name, folder):
    files = ["train/good/a.png", "valid/good/img/v.png", "valid/Ungood/img/v.png"]
    files += ["test/good/img/b.png", "test/good/label/b.png"]
    files += ["test/Ungood/img/c.png", "test/Ungood/label/c.png"]
    for other in ("Brain_AD", "Liver_AD", "RetinaRESC_AD", "RetinaOCT2017_AD", "Chest_AD"):
        (tmp_path / other).mkdir()
    for file in files:
        (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in (tmp_path, tmp_path / folder, "~"):
        c = config.resolve(get_config("bmad", f"{name},k=1,root={root}"))
        assert c.data.root == str(tmp_path / folder) and c.data.modality != "medical image"
        listed = layouts.folder(tmp_path / folder)
        assert listed.problems == ()
        assert [(e.id, e.label, e.part, e.masks) for e in listed.examples] == [
            ("test/Ungood/img/c.png", 1, "test", ("test/Ungood/label/c.png",)),
            ("test/good/img/b.png", 0, "test", ()),
            ("train/good/a.png", 0, "train", ()),
        ]


def test_an_unknown_set_of_bmad_is_refused():
    with pytest.raises(ConfigError, match="give one of brain, liver, resc"):
        get_config("bmad", "heart,k=4")
