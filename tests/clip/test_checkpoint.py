"""Loading checkpoints: what is refused, and how the message says it."""

import shutil
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from medclip_jax.clip import checkpoint, hf_weights
from medclip_jax.errors import CheckpointError, ConfigError
from tests.support.checkpoints import tiny_checkpoint


def test_unknown_checkpoint_says_what_to_do():
    with pytest.raises(CheckpointError, match="no such folder; give a folder, a Hub id or 'comp"):
        checkpoint.load("../nowhere/at/all")


def test_hub_failure_is_one_sentence(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(CheckpointError, match="the Hub did not give it"):
        checkpoint.load("someone/some-clip")


@pytest.fixture
def copy(tmp_path):
    return Path(shutil.copytree(hf_weights.EMBEDDED, tmp_path / "copy"))


def test_missing_tokenizer(copy):
    (copy / "vocab.json").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        checkpoint.load(str(copy))


def test_missing_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        checkpoint.load(str(copy))


@pytest.mark.parametrize("keep", [0, 5, 4000, 1_000_000])
def test_truncated_weights(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load(str(copy))


def test_missing_tensor_is_never_random(copy):
    tensors = load_file(copy / "model.safetensors")
    del tensors["vision_model.post_layernorm.bias"]
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match="post_layernorm.bias.*missing"):
        checkpoint.load(str(copy))


def test_damaged_config(copy):
    (copy / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json: cannot be read"):
        checkpoint.load(str(copy))
    (copy / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="need one of clip, siglip"):
        checkpoint.load(str(copy))


def test_damaged_msgpack(tmp_path):
    folder, *_ = tiny_checkpoint(tmp_path / "tiny")
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or not Flax msgpack"):
        checkpoint.load(str(folder))


def test_impossible_levels():
    with pytest.raises(ConfigError, match="between 1 and 8"):
        checkpoint.load("compact", layers=(3, 99))


@pytest.mark.parametrize("content", ["{", '{"image_mean": 3}', '{"image_std": [1, 1]}', "[]"])
def test_damaged_preprocessing(copy, content):
    (copy / "preprocessor_config.json").write_text(content)
    with pytest.raises(CheckpointError, match="preprocessor_config.json: "):
        checkpoint.load(str(copy))


@pytest.mark.parametrize("pin", ["", "@0123abc"])
def test_a_hub_id_may_be_pinned(monkeypatch, pin):
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    calls = []

    def fetch(repository, file, revision):
        calls.append((repository, revision))
        if not (hf_weights.EMBEDDED / file).is_file():
            raise EntryNotFoundError(file)
        return str(hf_weights.EMBEDDED / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    assert hf_weights.locate(f"org/name{pin}") == hf_weights.EMBEDDED
    assert set(calls) == {("org/name", pin[1:] or None)}


def test_without_a_network_the_hubs_cache_is_read(monkeypatch):
    """What a repository does not have is not in the cache, which is no fault."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def fetch(*_, **__):
        raise LocalEntryNotFoundError("offline")

    def cached(repository, file, revision):
        path = hf_weights.EMBEDDED / file
        return str(path) if repository == "org/name" and path.is_file() else None

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert hf_weights.locate("org/name") == hf_weights.EMBEDDED
    with pytest.raises(CheckpointError, match="org/other.*the Hub did not give it"):
        hf_weights.locate("org/other")


@pytest.mark.parametrize("name", ["a b", "a/b/c", "org/name@", "org/name@a b", "../x@main"])
def test_what_is_no_hub_id_is_said(name):
    with pytest.raises(CheckpointError, match="give a folder, a Hub id"):
        hf_weights.locate(name)
