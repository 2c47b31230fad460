"""What stands in place of names under --pseudonymise, and what stays of a sentence."""

import logging
import re

import pytest

from medclip_jax.errors import DataError
from medclip_jax.inference import loading, pseudonyms
from medclip_jax.inference.inputs import Item

NAME = "p3f1a12c4d5e6f798"


def test_whole_paths_are_hidden_and_numbers_are_not():
    paths = [f"/data/doe/{i}" for i in range(1, 100)]
    message = "/data/doe/7 holds 3 of the 10 frames (/data/doe/7), /data/doe/12 is below /data/doe"
    hidden = f"{NAME} holds 3 of the 10 frames, {NAME} is below ..."
    assert pseudonyms.without_names(message, paths, NAME) == hidden


@pytest.mark.parametrize("path", ["/3", "/7.5", "/:", "/DOE^JOHN", "/doe/3"])
def test_a_sentence_stays_as_it_is_also_of_a_file_in_the_root_folder(path):
    text = " holds 3 / 10 frames: Analyze 7.5"
    assert pseudonyms.without_names(path + text, [path], NAME) == NAME + text
    assert "DOE" not in pseudonyms.without_names("DOE^JOHN is broken", [path, "/DOE^JOHN"], NAME)
    kept = pseudonyms.without_names("20260131 holds 2026 of 3", ["/x/20260131", "/x/2026"], NAME)
    assert kept == f"{NAME} holds 2026 of 3"  # a long number may be a patient's


def test_of_files_whose_names_begin_alike_the_whole_name_is_replaced():
    item = Item(NAME, ("/doe/ANNA", "/doe/ANNA_B"), "dicom", NAME, ("p1", "p2"))
    error = DataError("/doe/ANNA_B and /doe/ANNA lie in /doe, not in /doenitz")
    assert loading.reason(error, item) == f"p2 and p1 lie in {NAME}, not in /doenitz"


def test_no_pseudonym_is_a_number_to_a_spreadsheet():
    names = [pseudonyms.pseudonym(str(i), b"salt") for i in range(9999)]
    assert not [name for name in names if re.match(r"[\d.+-]", name)] and len(set(names)) == 9999


def test_a_count_is_logged_where_a_file_is_called_by_that_number(tmp_path, caplog):
    caplog.set_level("INFO")
    item = Item("0123", (str(tmp_path / "2"),), "dicom", "0123")
    with pseudonyms.nameless_log([item]):
        logging.info("%d item(s), the first is %s", 2, "2")
        logging.info("%s is read", tmp_path / "2")
    assert caplog.messages == ["2 item(s), the first is 0123", "0123 is read"]
