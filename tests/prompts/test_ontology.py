"""The table: codes of the right form, sources that can be checked, look-up, synonyms, own files."""

import csv
import os
import re
from pathlib import Path

import pytest

from medclip_jax.data.catalog import PRESETS
from medclip_jax.errors import ConfigError
from medclip_jax.prompts import ontology
from tests.support.paths import ROOT

DATA = Path(os.environ.get("MEDCLIP_DATA", ROOT.parent / "shared" / "data"))
DISEASES = DATA / "terminology" / "disease_ontology" / "HumanDO.tsv"
LABELER = DATA / "terminology" / "chexpert_labeler" / "phrases" / "mention"
PHENOTYPES = Path(os.environ.get("MEDCLIP_HPO", DATA / "terminology" / "hp.obo"))
CHEXPERT = (
    *("No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Lesion", "Lung Opacity"),
    *("Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion"),
    *("Pleural Other", "Fracture", "Support Devices"),
)
TABLE = ontology.load()


def test_every_code_has_its_form_and_its_source():
    for c in TABLE.concepts:
        assert c.kind in ontology.KINDS
        arguments = {f for f in ontology.CODES if getattr(c, f)}
        said = ontology.sources(c)
        assert set(said) == arguments | {"words"} and all(said.values()), c
        for field in arguments:
            assert re.fullmatch(ontology.SHAPES[field][0], getattr(c, field)), c
        assert not c.sctid or ontology.check_digit(c.sctid), c
        assert len({ontology.key(w) for w in (c.name, *c.synonyms)}) == 1 + len(c.synonyms), c


@pytest.mark.parametrize("good", ["22298006", "195967001", "900000000000003001", "138875005"])
def test_check_digits_of_snomed(good):
    """Myocardial infarction, asthma, full name, the root; any one digit changed fails."""
    assert ontology.check_digit(good)
    for i, digit in enumerate(good):
        other = good[:i] + str((int(digit) + 1) % 10) + good[i + 1 :]
        assert not ontology.check_digit(other)
    swapped = good[:-2] + good[-1] + good[-2]
    assert swapped == good or not ontology.check_digit(swapped)


def test_snomed_codes_said_to_be_of_dicom_are_in_its_dictionary():
    dictionary = pytest.importorskip("pydicom.sr._concepts_dict").concepts["SCT"]
    known = {code for keyword in dictionary.values() for code in keyword}
    checked = [c for c in TABLE.concepts if ontology.sources(c).get("sctid") == "DICOM PS3.16"]
    assert len(checked) > 30
    assert not {c.sctid for c in checked} - known


@pytest.mark.skipif(not DISEASES.is_file(), reason="no HumanDO.tsv: set MEDCLIP_DATA")
def test_codes_of_the_disease_ontology_are_in_its_table():
    with DISEASES.open(encoding="utf-8", newline="") as file:
        label = {row["id"]: row["label"] for row in csv.DictReader(file, delimiter="\t")}
    checked = [c for c in TABLE.concepts if c.doid]
    assert len(checked) > 20
    for c in checked:
        assert ontology.find(TABLE, label[c.doid]) is c, (c.name, label[c.doid])


@pytest.mark.skipif(not PHENOTYPES.is_file(), reason="no hp.obo: set MEDCLIP_HPO")
def test_codes_said_to_be_of_hpo_are_cross_references_there():
    stanzas = PHENOTYPES.read_text("utf-8").split("\n[Term]\n")[1:]
    refers = {s[4:14]: set(re.findall(r"^xref: \w+:(\w+)", s, re.M)) for s in stanzas}
    checked = 0
    for c in TABLE.concepts:
        for field, source in ontology.sources(c).items():
            if source.startswith("HPO") and field != "words":
                assert getattr(c, field) in refers[source.split()[-1]], c
                checked += 1
    assert checked > 40


@pytest.mark.parametrize("label", CHEXPERT)
def test_every_label_of_chexpert_is_found(label):
    assert ontology.find(TABLE, label, "finding")


@pytest.mark.skipif(not LABELER.is_dir(), reason="no phrases of the CheXpert labeler")
def test_words_said_to_be_of_the_chexpert_labeler_share_one_with_it():
    files = {p.stem: p.read_text().casefold() for p in LABELER.glob("*.txt")}
    checked = 0
    for c in TABLE.concepts:
        if "CheXpert labeler" in ontology.sources(c)["words"]:
            words = " ".join((c.name, *c.synonyms)).casefold()
            phrases = [p.strip("_") for text in files.values() for p in text.split("\n") if p]
            assert any(p and p in words for p in phrases), c.name
            checked += 1
    assert checked > 10


@pytest.mark.parametrize("name", PRESETS)
def test_what_the_shipped_data_sets_show_is_known(name):
    arguments = PRESETS[name]
    words = ontology.expand(
        TABLE, arguments["conditions"], arguments["anatomy"], arguments["modality"], 3
    )
    assert words.anatomy[0] == arguments["anatomy"] and words.modality[0] == arguments["modality"]
    assert set(arguments["conditions"]) <= set(words.conditions)
    assert len(words.conditions) > 2 * len(arguments["conditions"])


def test_the_defaults_of_the_configuration_are_known():
    assert ontology.expand(TABLE, ("disease",), "tissue", "medical image", 1) == ontology.Words(
        ("tissue",), ("disease",), ("medical image",)
    )


@pytest.mark.parametrize(
    "asked", ["pneumothorax", " PneumoThorax ", "C0032326", "36118008", "rid5352", "doid:1673"]
)
def test_a_concept_is_found_by_name_and_by_each_code(asked):
    assert ontology.find(TABLE, asked).name == "pneumothorax"


def test_spaces_hyphens_and_case_do_not_matter():
    for asked in ("BI-RADS 4", "birads  4", "bi rads_4"):
        assert ontology.find(TABLE, asked).sctid == "397144001"
    assert ontology.find(TABLE, "space occupying lesion").name == "mass"


def test_an_unknown_term_names_the_nearest():
    with pytest.raises(ConfigError, match="no concept 'pnuemonia'; nearest: pneumonia"):
        ontology.find(TABLE, "pnuemonia")
    with pytest.raises(ConfigError, match="no anatomy 'pneumonia'"):
        ontology.find(TABLE, "pneumonia", "anatomy")
    with pytest.raises(ConfigError, match="no finding 'mas'; nearest: .*mass"):
        ontology.expand(TABLE, ("mas",), "breast", "ultrasound")
    with pytest.raises(ConfigError, match="no concept 'qqqqqqqq'; correct the word or add it"):
        ontology.find(TABLE, "qqqqqqqq")


def test_a_condition_is_looked_up_within_its_anatomy_first():
    for anatomy, there in [("breast", "breast neoplasm"), ("brain", "brain neoplasm")]:
        words = ontology.expand(TABLE, ("tumor",), anatomy, "ultrasound")
        assert words.conditions[:2] == ("tumor", f"{anatomy} tumor")
        assert there in words.conditions
    assert "neoplasm" in ontology.expand(TABLE, ("tumor",), "heart", "ultrasound").conditions


def test_expansion_is_bounded_and_without_repeats():
    for most in (1, 2, 3):
        words = ontology.expand(TABLE, ("mass", "mass", "Breast Mass"), "breast", "US", most)
        assert len(words.anatomy) <= most and len(words.modality) <= most
        keys = [ontology.key(w) for w in words.conditions]
        assert len(set(keys)) == len(keys) <= 2 * most


# --- a user's own table -------------------------------------------------------------------------


def own(tmp_path, text: str) -> str:
    path = tmp_path / "own.csv"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_own_rows_are_joined_and_appended(tmp_path):
    path = own(
        tmp_path,
        "kind,name,synonyms,cui,site\n"
        "finding,Pneumonia,chest infection|Pneumonie,C7777777,\n"
        'finding,tree-in-bud,"tree-in-bud pattern, centrilobular",,lung\n',
    )
    table = ontology.load(path)
    assert len(table.concepts) == len(TABLE.concepts) + 1
    old, new = ontology.find(TABLE, "pneumonia"), ontology.find(table, "Pneumonie")
    assert new.name == "pneumonia" and new.cui == "C7777777" and new.sctid == old.sctid
    assert new.synonyms == (*old.synonyms, "chest infection", "Pneumonie")
    assert "own.csv line 2" in ontology.sources(new)["cui"]
    assert ontology.sources(new)["sctid"] == ontology.sources(old)["sctid"]
    added = ontology.find(table, "tree in bud")
    assert added.site == "lung" and added.synonyms == ("tree-in-bud pattern, centrilobular",)
    words = ontology.expand(table, ("tree-in-bud",), "lung", "CT", 2)
    assert words.conditions == ("tree-in-bud", "tree-in-bud pattern, centrilobular")


@pytest.mark.parametrize(
    "text, why",
    [
        ("name,synonyms\nx,y\n", "has no column kind: add it"),
        ("", "has no column kind and name"),
        ("kind,name,synonym\nfinding,x,y\n", "unknown column synonym"),
        ("kind,name\norgan,x\n", "line 2: kind is 'organ', give one of anatomy"),
        ("kind,name\nfinding, \n", "line 2 has no name"),
        ("kind,name\nfinding,a,b\n", "line 2 has more or fewer cells"),
        ("kind,name,cui\nfinding,x,C123\n", "cui 'C123' is not a code"),
        ("kind,name,rid\nfinding,x,1301\n", "rid '1301' is not a code"),
        ("kind,name,sctid\nfinding,x,36118009\n", "sctid '36118009' is not a code.*check digit"),
        ("kind,name,synonyms\nfinding,x,pneumonia\n", "calls both 'pneumonia' and 'x'"),
        ("kind,name,site\nfinding,x,elbow\n", "has no 'elbow', of which 'x' is part"),
        ('kind,name\nfinding,"x\n' + "finding,y\n" * 20_000, "as a table .*: close its quotes"),
        ('kind,"name' + "," * 200_000, "as a table .*: close its quotes"),
    ],
)
def test_own_files_that_cannot_be_used_say_why(tmp_path, text, why):
    with pytest.raises(ConfigError, match=why):
        ontology.load(own(tmp_path, text))


def test_own_files_that_cannot_be_read_say_why(tmp_path):
    with pytest.raises(ConfigError, match="no such file; correct the path"):
        ontology.load(str(tmp_path / "nothing.csv"))
    (tmp_path / "latin.csv").write_bytes("kind,name\nfinding,Ödem\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="cannot be read.*UTF-8"):
        ontology.load(str(tmp_path / "latin.csv"))
