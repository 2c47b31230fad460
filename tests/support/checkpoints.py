"""A random CLIP of a few thousand parameters as a checkpoint folder, and those of the reference."""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file, save_file
from transformers import CLIPConfig
from transformers.models.clip.modeling_flax_clip import FlaxCLIPModel

from medclip_jax.clip import hf_weights
from tests.support.reference import reference_params

PARITY = reference_params("mediclip_parity_*/parity112.npz", "mediclip_parity_*/parity224.npz")
TOKENIZER = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json")
END = (
    len(json.loads((hf_weights.EMBEDDED / "vocab.json").read_text())) - 1
)  # of text; the largest id
START = END - 1


class Theirs(FlaxCLIPModel):
    """Without the random start, which takes long and which the checkpoint replaces."""

    def init_weights(self, rng, input_shape, params=None):
        whole = super().init_weights
        shapes = jax.eval_shape(lambda key: whole(key, input_shape), rng)
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def with_tokenizer(folder: Path, target: Path) -> Path:
    """A copy of a checkpoint folder in one file of weights, with (the embedded) tokenizer too."""
    target.mkdir()
    tensors = {}
    for part in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(part)
    save_file(tensors, target / "model.safetensors")
    shutil.copyfile(folder / "config.json", target / "config.json")
    copy_tokenizer(target)
    return target


def copy_tokenizer(target: Path) -> None:
    for name in TOKENIZER:
        shutil.copyfile(hf_weights.EMBEDDED / name, target / name)


def tiny_model(activation: str, text_blocks: int = 1) -> tuple[FlaxCLIPModel, dict]:
    """A small CLIP of transformers' own making and random parameters for it.

    They are drawn here, biases too: transformers starts those at 0, which would hide a bias in the
    wrong place. Nor is its own init compiled, which is slow.
    """
    encoder = dict(
        hidden_size=32, intermediate_size=64, num_attention_heads=2, hidden_act=activation
    )
    config = CLIPConfig(
        projection_dim=16,
        vision_config=dict(num_hidden_layers=4, image_size=32, patch_size=8, **encoder),
        text_config=dict(
            num_hidden_layers=text_blocks,
            vocab_size=END + 1,
            bos_token_id=START,
            eos_token_id=END,
            **encoder,
        ),
    )
    shape = (1, 77), (1, 32, 32, 3)
    model = FlaxCLIPModel(config, input_shape=shape, _do_init=False)
    shapes = jax.eval_shape(lambda key: model.init_weights(key, shape), jax.random.PRNGKey(0))
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        name = path[-1].key
        spread = 0.05 if name in ("bias", "scale") else 0.2
        return (name == "scale") + spread * rng.normal(size=leaf.shape).astype(np.float32)

    return model, jax.tree_util.tree_map_with_path(draw, dict(shapes))


def tiny_checkpoint(
    target: Path, activation: str = "gelu", text_blocks: int = 1
) -> tuple[Path, FlaxCLIPModel, dict]:
    """`tiny_model` saved as Flax msgpack, with a tokenizer.

    One block of text suffices where its gradient is compiled, which takes most of a test's time.
    """
    model, params = tiny_model(activation, text_blocks)
    model.save_pretrained(target, params=params)
    copy_tokenizer(target)
    return target, model, params


@partial(jax.jit, static_argnames="encoder")
def image_features(vision, pixels, encoder):
    return encoder.apply({"params": vision}, pixels)
