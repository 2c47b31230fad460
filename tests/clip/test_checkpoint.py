"""Loading checkpoints: what is refused, and how the message says it."""

import json
import shutil
import time
from pathlib import Path
from unittest import mock

import jax.numpy as jnp
import numpy as np
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


def change(copy: Path, part: str, **fields) -> None:
    config = json.loads((copy / "config.json").read_text())
    (config[part] if part else config).update(fields)
    (copy / "config.json").write_text(json.dumps(config).replace("Infinity", "1e400"))


@pytest.mark.parametrize(
    ("part", "fields", "said"),
    [
        ("vision_config", {"image_size": 1_000_000}, "image_size is 1000000, outside 1 to 4096"),
        ("vision_config", {"image_size": 4096}, "do not fit its config"),
        ("vision_config", {"patch_size": 8}, r"\(patch_size of the images is 8, not 16\)"),
        ("vision_config", {"hidden_size": 384}, r"\(hidden_size of the images is 384, not 192\)"),
        ("vision_config", {"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, outside"),
        ("vision_config", {"num_attention_heads": 1e400}, "is inf where a whole number belongs"),
        ("vision_config", {"layer_norm_eps": "x"}, "layer_norm_eps is 'x' where a number belongs"),
        ("text_config", {"eos_token_id": "x"}, "eos_token_id is 'x' where a whole number"),
        ("text_config", {"hidden_size": None}, "hidden_size is None where a whole number"),
        ("", {"vision_config_dict": {"num_hidden_layers": 10**7}}, "is 10000000, outside"),
    ],
)
def test_numbers_of_a_config_are_compared_before_they_take_memory(copy, part, fields, said):
    """Nor is there an image of the size that a config promises."""
    change(copy, part, **fields)
    with mock.patch.object(jnp, "zeros", wraps=jnp.zeros) as zeros:
        with pytest.raises(CheckpointError, match=said):
            checkpoint.load(str(copy))
    assert all(np.prod(x.args[0]) < 1e5 for x in zeros.call_args_list)


@pytest.mark.parametrize("part", ["", "vision_config"])
def test_names_of_classes_are_not_made(copy, part):
    """Of which transformers would make three million."""
    change(copy, part, num_labels=3_000_000, id2label={"0": "a"}, label2id={"a": 0})
    start = time.process_time()
    config = hf_weights.read(copy).config
    assert time.process_time() - start < 3 and config["vision_config"]["hidden_size"] == 192


def test_damaged_msgpack(tmp_path):
    folder, *_ = tiny_checkpoint(tmp_path / "tiny")
    path = folder / "flax_model.msgpack"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="damaged or not Flax msgpack"):
        checkpoint.load(str(folder))


def test_impossible_levels():
    with pytest.raises(ConfigError, match="between 1 and 8"):
        checkpoint.load("compact", layers=(3, 99))


WRONG = '{"image_mean": [1, 1, "nan"]}', '{"image_std": [1, 0, 1]}', '{"image_std": [1, 1, 1e400]}'


@pytest.mark.parametrize(
    "content", ["{", '{"image_mean": 3}', '{"image_std": [1, 1]}', "[]", *WRONG]
)
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
