"""Folders in the shipped layouts; no test finds a user's own data."""

from pathlib import Path

import pytest

from tests.support.folders import write_busi, write_folder


@pytest.fixture
def busi(tmp_path) -> Path:
    return write_busi(tmp_path / "data" / "Dataset_BUSI_with_GT")


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(tmp_path / "mine")


@pytest.fixture
def cache(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def no_named_root(monkeypatch):
    monkeypatch.delenv("MEDCLIP_DATA", raising=False)
