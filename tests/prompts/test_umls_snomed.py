"""Licensed releases: small files in the real formats, and memory that does not grow with them."""

import tracemalloc

import pytest

from medclip_jax.errors import ConfigError
from medclip_jax.prompts import ontology, umls_snomed

PNEUMONIA, TUMOR = "C0032285", "C1458155"


def atom(cui, text, lat="ENG", sab="MSH", tty="MH", code="D0", suppress="N") -> str:
    """One line of MRCONSO.RRF: 18 columns, each ended by a bar."""
    left = f"{cui}|{lat}|P|L0032285|PF|S0075594|Y|A0103370||M0017062|{code}|{sab}|{tty}|{code}"
    return f"{left}|{text}|0|{suppress}|256|\n"


ATOMS = (
    atom("C0000005", "(131)I-Macroaggregated Albumin"),
    atom(PNEUMONIA, "Pneumonias"),
    atom(PNEUMONIA, "Lungenentzündung", lat="GER"),
    atom(PNEUMONIA, "Old pneumonia", suppress="O"),
    atom(PNEUMONIA, "Pneumonia (disorder)", sab="SNOMEDCT_US", tty="FN", code="233604007"),
    atom(PNEUMONIA, "Inflammation of lung", sab="SNOMEDCT_US", tty="PT", code="233604007"),
    atom(TUMOR, "Mammary Neoplasms"),
    atom("C9999999", "Something else"),
)


@pytest.fixture
def release(tmp_path):
    path = tmp_path / "META" / "MRCONSO.RRF"
    path.parent.mkdir()
    path.write_text("".join(ATOMS), encoding="utf-8")
    return path


def rf2(folder, descriptions, concepts=()):
    """An RF2 release as it is unpacked: Snapshot/Terminology, tab separated, CRLF."""
    terminology_folder = folder / "Snapshot" / "Terminology"
    terminology_folder.mkdir(parents=True)
    header = "id effectiveTime active moduleId conceptId languageCode typeId term"
    header = f"{header} caseSignificanceId".split()
    lines = [header, *descriptions]
    name = "sct2_Description_Snapshot-en_INT_20240101.txt"
    text = "".join("\t".join(line) + "\r\n" for line in lines)
    (terminology_folder / name).write_bytes(text.encode())
    header = "id effectiveTime active moduleId definitionStatusId".split()
    text = "".join("\t".join(line) + "\r\n" for line in [header, *concepts])
    (terminology_folder / "sct2_Concept_Snapshot_INT_20240101.txt").write_bytes(text.encode())
    return folder


def description(concept, term, kind=umls_snomed.SYNONYM, active="1", language="en"):
    core, case = "900000000000207008", "900000000000448009"
    return ("101013", "20170731", active, core, concept, language, kind, term, case)


def concept(sctid, active="1"):
    return (sctid, "20020131", active, "900000000000207008", "900000000000074008")


@pytest.fixture
def said(monkeypatch):
    lines = []
    for module in (ontology, umls_snomed):
        monkeypatch.setattr(module.logging, "warning", lambda text, *a: lines.append(text % a))
    return lines


def test_umls_gives_words_in_one_language_without_suppressed_ones(release):
    got = umls_snomed.umls(release, {PNEUMONIA, TUMOR})
    assert got[PNEUMONIA].words == ("Pneumonias", "Pneumonia", "Inflammation of lung")
    assert got[PNEUMONIA].sctids == {"233604007"}
    assert got[TUMOR] == umls_snomed.Entry(("Mammary Neoplasms",), frozenset())
    assert set(got) == {PNEUMONIA, TUMOR}
    german = umls_snomed.umls(release, {PNEUMONIA}, language="GER")
    assert german[PNEUMONIA].words == ("Lungenentzündung",)


@pytest.mark.parametrize("named", ["MRCONSO.RRF", ""])
def test_the_ontology_takes_words_from_umls(release, said, named):
    table = ontology.load(str(release.parent / named))
    assert ontology.find(table, "inflammation of lung").name == "pneumonia"
    assert ontology.find(table, "mammary neoplasms").name == "breast tumor"
    before = ontology.load()
    assert len(table.concepts) == len(before.concepts)
    assert ontology.find(table, "pneumonia").sctid == "233604007"
    assert any("does not know C0032326 (pneumothorax)" in line for line in said)


def test_umls_fills_an_empty_snomed_code_and_tells_of_another(release, said):
    line = atom("C0024485", "MRI scan NOS", sab="SNOMEDCT_US", tty="PT", code="113091000")
    other = atom(TUMOR, "Tumor of breast", sab="SNOMEDCT_US", tty="PT", code="254837009")
    release.write_text("".join((*ATOMS, line, other)), encoding="utf-8")
    assert not ontology.find(ontology.load(), "MRI").sctid
    table = ontology.load(str(release))
    mri = ontology.find(table, "MRI")
    assert mri.sctid == "113091000" and ontology.sources(mri)["sctid"] == "UMLS MRCONSO"
    assert ontology.find(table, "breast tumor").sctid == "126926005"
    assert any("breast tumor (C1458155) to SNOMED CT 254837009" in line for line in said)


def test_snomed_gives_active_words_without_tags(tmp_path, said):
    folder = rf2(
        tmp_path / "rf2",
        [
            description("233604007", "Pneumonia (disorder)", umls_snomed.FULL_NAME),
            description("233604007", "Pulmonic inflammation"),
            description("233604007", "Retired name", active="0"),
            description("233604007", "Neumonía", language="es"),
            description("233604007", "A definition.", kind="900000000000550004"),
            description("999999003", "Not asked for"),
            description("60046008", "Fluid in pleura"),
        ],
        [concept("233604007"), concept("60046008", active="0")],
    )
    got = umls_snomed.snomed(folder, {"233604007", "60046008"})
    assert got == {
        "233604007": umls_snomed.Entry(
            ("Pneumonia", "Pulmonic inflammation"), frozenset({"233604007"})
        )
    }
    assert said == [f"SNOMED CT 60046008 is no longer active in {folder}"]
    table = ontology.load(str(folder))
    assert ontology.find(table, "pulmonic inflammation").name == "pneumonia"


def test_a_word_that_names_another_concept_is_left_out(tmp_path, said):
    folder = rf2(tmp_path / "rf2", [description("233604007", "Atelectasis")])
    table = ontology.load(str(folder))
    assert ontology.find(table, "atelectasis").name == "atelectasis"


def test_what_is_not_a_release_is_named(tmp_path):
    path = tmp_path / "MRCONSO.RRF"
    path.write_text("C0032285|ENG|P\n")
    with pytest.raises(ConfigError, match="line 1 has 3 columns, MRCONSO.RRF has 18"):
        umls_snomed.umls(path, {PNEUMONIA})
    path.write_bytes(atom("C0000001", "x").encode() + b"C0032285|ENG|\xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        umls_snomed.umls(path, {PNEUMONIA})
    with pytest.raises(ConfigError, match="has no sct2_Description_Snapshot"):
        umls_snomed.snomed(tmp_path, {"233604007"})
    folder = rf2(tmp_path / "rf2", [("101013", "20170731", "1")])
    with pytest.raises(ConfigError, match="line 2 has 3 columns, its header 9"):
        umls_snomed.snomed(folder, {"233604007"})
    (file,) = folder.rglob("sct2_Description*")
    file.write_text("id\tactive\tconceptId\tterm\n")
    with pytest.raises(ConfigError, match="has no column languageCode, typeId"):
        umls_snomed.snomed(folder, {"233604007"})


def test_memory_does_not_grow_with_the_release(tmp_path):
    """20 MB of other people's words leave less than 2 MB behind."""
    path = tmp_path / "MRCONSO.RRF"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(200):
            file.write(atom("C0000005", "x" * 900) * 100)
        file.write(ATOMS[1])
    assert path.stat().st_size > 19_000_000
    tracemalloc.start()
    got = umls_snomed.umls(path, {PNEUMONIA})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert got[PNEUMONIA].words == ("Pneumonias",) and peak < 2_000_000


def test_a_file_of_one_endless_line_is_refused(tmp_path):
    path = tmp_path / "MRCONSO.RRF"
    path.write_text("x" * (umls_snomed.LONGEST + 1))
    with pytest.raises(ConfigError, match="has a line of over"):
        umls_snomed.umls(path, {PNEUMONIA})
