"""Files whose names are numbers under --pseudonymise: they are hidden, numbers are not."""

import logging

from medclip_jax.inference import pseudonyms
from medclip_jax.inference.inputs import Item


def test_files_called_by_numbers_are_hidden_and_numbers_are_not():
    paths = [f"/data/doe/{i}" for i in range(1, 100)]
    message = "/data/doe/7 and 12 hold 120 of the 300 frames below /data/doe, copy 8 again"
    hidden = pseudonyms.without_names(message, paths, "3f1a12c4d5e6f798")
    assert hidden == "{0} and {0} hold 120 of the 300 frames below ..., copy {0} again".format(
        "3f1a12c4d5e6f798"
    )


def test_a_count_is_logged_where_a_file_is_called_by_that_number(tmp_path, caplog):
    caplog.set_level("INFO")
    item = Item("0123", (str(tmp_path / "2"),), "dicom", "0123")
    with pseudonyms.nameless_log([item]):
        logging.info("%d item(s), the first is %s", 2, "2")
        logging.info("%s is read", tmp_path / "2")
    assert caplog.messages == ["2 item(s), the first is 0123", "0123 is read"]
