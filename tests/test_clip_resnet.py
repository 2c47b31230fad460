"""The ResNet tower against open_clip's own module (experiments/make_resnet_fixture.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from medclip_jax import clip_resnet
from medclip_jax.errors import CheckpointError, ConfigError

FIXTURE = Path(__file__).parent / "reference" / "clip_resnet"
WEIGHTS = FIXTURE / "tower.safetensors"
run = jax.jit(clip_resnet.patch_features, static_argnames="tower")


def test_it_equals_open_clip():
    ref = np.load(FIXTURE / "expected.npz")
    params, tower = clip_resnet.load(WEIGHTS, (1, 2, 3, 4))
    assert tower == clip_resnet.Tower((2, 1, 2, 1), 2, 64, (1, 2, 3, 4))
    got = run(params, jnp.asarray(ref["pixels"]), tower=tower)
    np.testing.assert_allclose(got.pooled, ref["pooled"], atol=1e-4 * np.abs(ref["pooled"]).max())
    assert np.abs(ref["pooled"]).max() > 0.1
    for number, level in enumerate(got.levels, 1):
        want = ref[f"stage{number}"]
        assert level.shape == (2, (64 // 2 ** (number + 1)) ** 2, want.shape[-1])
        np.testing.assert_allclose(level.reshape(want.shape), want, atol=1e-4 * np.abs(want).max())


def test_only_the_tapped_stages_come():
    ref = np.load(FIXTURE / "expected.npz")
    params, tower = clip_resnet.load(WEIGHTS, (2, 4))
    got = run(params, jnp.asarray(ref["pixels"][:1]), tower=tower)
    assert [x.shape[1] for x in got.levels] == [64, 4]


@pytest.mark.parametrize(
    ("depths", "width", "heads", "size"),
    [  # OpenAI's RN50, RN101, RN50x4, RN50x16, RN50x64: what open_clip's configs say of them
        ((3, 4, 6, 3), 64, 32, 224),
        ((3, 4, 23, 3), 64, 32, 224),
        ((4, 6, 10, 6), 80, 40, 288),
        ((6, 8, 18, 8), 96, 48, 384),
        ((3, 15, 36, 10), 128, 64, 448),
    ],
)
def test_sizes_of_the_published_towers_follow_from_the_tensors(depths, width, heads, size):
    flat = {"attnpool.positional_embedding": np.zeros(((size // 32) ** 2 + 1, width * 32))}
    flat |= {f"layer{s}.{i}.conv1.weight": None for s, n in enumerate(depths, 1) for i in range(n)}
    assert clip_resnet.shape_of(flat, (4,)) == clip_resnet.Tower(depths, heads, size, (4,))


def test_what_cannot_be_read_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"rising stages from 1 to 4"):
        clip_resnet.load(WEIGHTS, (0, 2))
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="download it again"):
        clip_resnet.load(broken)
    tensors = load_file(WEIGHTS)
    del tensors["visual.layer2.0.bn2.running_var"]
    save_file(tensors, broken)
    with pytest.raises(CheckpointError, match=r"visual\.layer2\.0\.bn2\.running_var is missing"):
        clip_resnet.load(broken)
    save_file({"visual.proj": np.zeros(3, np.float32)}, broken)  # a ViT's
    with pytest.raises(CheckpointError, match="not a ResNet CLIP"):
        clip_resnet.load(broken)
