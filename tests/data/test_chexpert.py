"""CheXpert's layout and labels, on a folder that the test writes in that layout."""

import csv
import json
import os
from pathlib import Path

import pytest

from medclip_jax import main
from medclip_jax.data import chexpert, datasets, splits
from medclip_jax.data.chexpert import COLUMNS, FINDINGS
from medclip_jax.errors import ConfigError, DataError
from tests.support.folders import png

OTHERS = ("Sex", "Age", "AP/PA", "Support Devices")


def row(patient: int, view: str = "Frontal", part: str = "train", **labels: str) -> dict:
    path = f"CheXpert-v1.0-small/{part}/patient{patient:05d}/study1/view1_{view.lower()}.jpg"
    labels = {name.replace("_", " "): value for name, value in labels.items()}
    return {"Path": path, "Frontal/Lateral": view} | labels


def write(root: Path, name: str, rows: list[dict], columns=(*COLUMNS, *OTHERS)) -> None:
    for n, held in enumerate(rows):
        png(root / held["Path"].partition("/")[2], n + 100 * (name == "valid"))
    with (root / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


TRAIN = [
    *(row(n, No_Finding="1.0") for n in range(6)),
    row(6, No_Finding="1.0", Support_Devices="1.0"),  # a device is no finding
    row(7, No_Finding="1.0", Edema="-1.0"),
    row(8, Edema="1.0", Pneumonia="-1.0"),
    row(9, Pneumonia="-1.0"),
    row(10, Support_Devices="1.0"),  # nothing said of health
    row(11, view="Lateral", No_Finding="1.0"),
    row(20, No_Finding="1.0"),  # whose other film is in valid.csv
    row(12, No_Finding="1.0", **dict.fromkeys(FINDINGS, "0.0")),
]
ZERO = dict.fromkeys(FINDINGS, "0.0")
VALID = [
    row(20, part="valid", No_Finding="1.0", **ZERO),
    row(21, part="valid", No_Finding="1.0", **ZERO),
    row(22, part="valid", No_Finding="0.0", **(ZERO | {"Cardiomegaly": "1.0"})),
    row(23, part="valid", No_Finding="0.0", **ZERO),
]


@pytest.fixture
def root(tmp_path) -> Path:
    place = tmp_path / "data" / "CheXpert-v1.0-small"
    place.mkdir(parents=True)
    write(place, "train", TRAIN)
    write(place, "valid", VALID)
    return place


def held(root: Path, uncertain="exclude") -> tuple[set[int], set[int]]:
    """Patients of the train part by label."""
    listed = [e for e in chexpert.layout(root, uncertain).examples if e.part == "train"]
    return tuple({int(e.patient[-5:]) for e in listed if e.label == label} for label in (0, 1))


@pytest.mark.parametrize(
    "uncertain, healthy, abnormal",
    [
        ("exclude", {0, 1, 2, 3, 4, 5, 6, 12, 20}, {8}),
        ("positive", {0, 1, 2, 3, 4, 5, 6, 12, 20}, {7, 8, 9}),
        ("negative", {0, 1, 2, 3, 4, 5, 6, 7, 12, 20}, {8}),
    ],
)
def test_uncertain_labels(root, uncertain, healthy, abnormal):
    assert held(root, uncertain) == (healthy, abnormal)


def test_records_and_split_by_patient(root, tmp_path):
    cache = tmp_path / "cache"
    records = datasets.load("chexpert", root.parent, cache)
    assert all(r.id.endswith("frontal.jpg") for r in records)
    assert {r.patient for r in records if r.part == "test"} == {
        f"patient{n:05d}" for n in (20, 21, 22)
    }
    for kind in splits.KINDS:
        drawn = splits.split(records, 6, 0, kind=kind)
        assert not splits.patients(drawn.support) & splits.patients(drawn.test)
        assert [r.label for r in drawn.test] == [0, 0, 1]
        with pytest.raises(ConfigError, match="give K from 0 to 8"):  # patient 20 is out
            splits.split(records, 9, 0, kind=kind)
    more = datasets.load("chexpert", root, cache, uncertain="positive")
    assert sum(r.label for r in more) == sum(r.label for r in records) + 2


def test_missing_column_is_named(root):
    write(root, "valid", VALID, [c for c in COLUMNS if c != "Edema"])
    with pytest.raises(DataError, match=r"valid\.csv has no column 'Edema': give the table"):
        chexpert.layout(root)


def test_a_table_of_a_gigabyte_is_not_read(root):
    os.truncate(root / "train.csv", 1 << 30)
    with pytest.raises(
        DataError, match=r"train\.csv cannot be read as a table \(it has 1073741824"
    ):
        chexpert.layout(root)


def test_row_without_file_is_named(root, tmp_path):
    (root / "train" / "patient00003" / "study1" / "view1_frontal.jpg").unlink()
    with pytest.raises(DataError, match=r"train\.csv names 1 image.*patient00003.* in line 5"):
        datasets.load("chexpert", root, tmp_path / "cache")


@pytest.mark.parametrize(
    "change, said",
    [
        ({"Edema": "maybe"}, r"'maybe' in line 2 where a label is 1, 0, -1"),
        ({"Path": "../../etc/train/passwd"}, "is no path of CheXpert"),
        ({"Path": "elsewhere.jpg"}, "is no path of CheXpert"),
    ],
)
def test_rows_that_are_none(root, change, said):
    rows = [TRAIN[0] | change]
    with (root / "train.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, (*COLUMNS, *OTHERS), restval="")
        table.writeheader()
        table.writerows(rows)
    with pytest.raises(DataError, match=said):
        chexpert.layout(root)


def test_unknown_meaning_and_missing_set(root, tmp_path):
    with pytest.raises(ConfigError, match=r"config\.data\.uncertain"):
        chexpert.layout(root, "perhaps")
    (root / "valid.csv").unlink()
    with pytest.raises(DataError, match=r"no CheXpert below .*valid\.csv"):
        datasets.load("chexpert", root, tmp_path)


def test_the_config_runs_from_a_folder_to_the_report(world, tmp_path, root, capsys):
    """As on the command line: a missing film is said at once, then two label policies are run."""

    def run(name: str, **data: str) -> int:
        fields = world.fields() | {"steps": 2, "synthesis.variants": 4, "memory_coreset": 0.5}
        argv = ["main", f"--config=configs/chexpert.py:k=4,root={root.parent}"]
        argv += [f"--config.{n}={x}" for n, x in (fields | data).items()]
        return main.main([*argv, f"--workdir={tmp_path / name}"])

    film = root / "valid" / "patient00022" / "study1" / "view1_frontal.jpg"
    content = film.read_bytes()
    film.unlink()
    assert run("exclude") == 2
    assert "valid.csv names 1 image(s) that are not there" in capsys.readouterr().err
    assert not (tmp_path / "exclude").exists() or not any((tmp_path / "exclude").glob("*.json"))
    film.write_bytes(content)
    for policy in ("exclude", "positive"):
        assert run(policy, **{"data.uncertain": policy}) == 0
        split = json.loads((tmp_path / policy / "split.json").read_text())
        seen = {row["id"] for part in ("support", "test") for row in split[part]}
        metrics = json.loads((tmp_path / policy / "metrics.json").read_text())
        assert (metrics["dataset"], metrics["k"], metrics["pixel"]) == ("chexpert", 4, None)
        assert (tmp_path / policy / "report.html").is_file()
        support, test = ({r["id"].split("/")[1] for r in split[x]} for x in ("support", "test"))
        assert not support & test and test == {f"patient{n:05d}" for n in (20, 21, 22)}
        assert not any("lateral" in name for name in seen)
