"""The feature cache: names follow content, nothing damaged is believed."""

import errno
import os

import jax
import numpy as np
import pytest

from medclip_jax import files
from medclip_jax.errors import WorkdirError
from medclip_jax.features import cache, encoder
from tests.support.damaged import one_bit
from tests.support.pictures import everything, opened, record_of


def test_a_name_is_the_content_and_not_the_place(feature_cache, pictures, tmp_path):
    moved = tmp_path / "elsewhere.png"
    moved.write_bytes(pictures[0].path.read_bytes())
    other = record_of(moved)
    assert cache.image_path(feature_cache, pictures[0]) == cache.image_path(feature_cache, other)
    assert cache.image_path(feature_cache, pictures[0]) != cache.image_path(
        feature_cache, pictures[1]
    )
    encoder.encode_images(feature_cache, pictures[:1])
    assert encoder.encode_images(feature_cache, [other]) == 0


def test_whatever_changes_tokens_changes_the_name(tmp_path, tiny):
    vision = tiny.image_encoder
    towers = [
        tiny._replace(digest="another"),
        tiny._replace(image_encoder=vision.clone(levels=(2, 4))),
        tiny._replace(image_encoder=vision.clone(dtype="bfloat16")),
        tiny._replace(size=64),
        tiny._replace(mean=(0.5, 0.5, 0.5)),
        tiny._replace(std=(0.5, 0.5, 0.5)),
    ]
    folders = [opened(tmp_path, t).folder for t in [tiny, *towers]]
    folders += [opened(tmp_path, tiny, fit="pad").folder]
    folders += [opened(tmp_path, tiny, dtype="bfloat16").folder]
    target = opened(tmp_path, tiny)
    folders += [cache.with_recipe(target, "", window).folder for window in ("brain", "lung")]
    assert len(set(folders)) == len(folders) == 11
    assert cache.with_recipe(target, "", "40/80").folder == folders[-2]
    assert opened(tmp_path, tiny._replace(name="a copy")).folder == folders[0]


@pytest.mark.parametrize("keep", [0, 5, -1])
def test_a_truncated_file_is_encoded_again(feature_cache, pictures, keep, caplog):
    encoder.encode_images(feature_cache, pictures[:2])
    wanted = everything(feature_cache, pictures[:2])
    path = cache.image_path(feature_cache, pictures[1])
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    assert encoder.encode_images(feature_cache, pictures[:2]) == 1
    assert "is damaged and will be encoded again" in caplog.text
    assert path.read_bytes() == whole
    jax.tree.map(np.testing.assert_array_equal, everything(feature_cache, pictures[:2]), wanted)


def test_a_flipped_bit_anywhere_is_found(feature_cache, pictures):
    encoder.encode_images(feature_cache, pictures[:1])
    path = cache.image_path(feature_cache, pictures[0])
    whole = path.read_bytes()
    head = 8 + int.from_bytes(whole[:8], "little")
    flips = [*one_bit(whole[:head], head), *one_bit(whole, 2000)]
    for flipped in flips:
        path.write_bytes(flipped + whole[head:] if len(flipped) == head else flipped)
        assert not cache.is_whole(path)
    path.write_bytes(whole)
    assert cache.is_whole(path)


def test_a_whole_file_under_anothers_name_is_not_believed(feature_cache, pictures):
    encoder.encode_images(feature_cache, pictures[:2])
    wanted = everything(feature_cache, pictures[:2])
    first, second = (cache.image_path(feature_cache, r) for r in pictures[:2])
    first.write_bytes(second.read_bytes())
    assert encoder.encode_images(feature_cache, pictures[:2]) == 1
    jax.tree.map(np.testing.assert_array_equal, everything(feature_cache, pictures[:2]), wanted)


def test_a_file_half_written_by_a_killed_run_does_not_count(feature_cache, pictures):
    path = cache.image_path(feature_cache, pictures[0])
    path.parent.mkdir(parents=True)
    path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
    assert encoder.encode_images(feature_cache, pictures[:1]) == 1


def test_a_full_disk_is_one_sentence_and_leaves_nothing(feature_cache, pictures, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", full)  # the last chance of a disk to say so
    with pytest.raises(WorkdirError) as caught:
        encoder.encode_images(feature_cache, pictures[:1])
    message = str(caught.value)
    assert str(cache.image_path(feature_cache, pictures[0])) in message
    assert "No space left on device" in message and "free space there" in message
    assert list(feature_cache.folder.iterdir()) == []
    monkeypatch.undo()
    assert encoder.encode_images(feature_cache, pictures[:1]) == 1


def test_what_a_killed_process_left_is_swept(feature_cache, pictures):
    encoder.encode_images(feature_cache, pictures[:1])
    left = feature_cache.folder / ".image.safetensors.4194305.tmp"  # no process has that number
    left.touch()
    with files.writing(feature_cache.folder / "at work"):
        again = cache.open(
            *(feature_cache.folder.parents[1], feature_cache.clip, feature_cache.fit),
            *(feature_cache.dtype, feature_cache.mesh),
        )
        assert again.folder == feature_cache.folder and not left.exists()
        assert len(list(feature_cache.folder.glob(".*.tmp"))) == 1
