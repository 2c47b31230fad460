"""A tiny ResNet CLIP encoder with random weights and what open_clip's own module makes of it.

    python tests/reference/clip_resnet/make.py FOLDER

Needs torch and open_clip_torch (MIT), with torchvision or not: only its FrozenBatchNorm2d is
imported, and not used here. Writes tower.safetensors (OpenAI's names) and expected.npz.
"""

import sys
import types
from pathlib import Path

import numpy as np

try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError):  # absent, or of another torch
    names = "torchvision", "torchvision.ops", "torchvision.ops.misc"
    modules = {name: types.ModuleType(name) for name in names}
    modules[names[2]].FrozenBatchNorm2d = type("FrozenBatchNorm2d", (), {})
    sys.modules.update(modules)
# the package's own __init__ imports all models; the module alone is enough
import importlib.util

import torch
from safetensors.torch import save_file

DEPTHS, WIDTH, SIZE, JOINT = (2, 1, 2, 1), 4, 64, 8


def peer_module():
    """open_clip/modified_resnet.py by itself."""
    package = importlib.util.find_spec("open_clip")
    folder = Path(package.submodule_search_locations[0])
    shell = types.ModuleType("open_clip")
    shell.__path__ = [str(folder)]
    sys.modules["open_clip"] = shell
    return importlib.import_module("open_clip.modified_resnet")


def main(target: Path) -> None:
    torch.manual_seed(0)
    heads = WIDTH * 32 // 64
    encoder = peer_module().ModifiedResNet(DEPTHS, JOINT, heads, image_size=SIZE, width=WIDTH)
    state = encoder.state_dict()
    for name, value in state.items():  # its own init has norms of 1 and 0, which hide mistakes
        if name.endswith("running_var"):
            value.uniform_(0.5, 2.0)
        elif name.endswith("running_mean") or name.endswith("bias"):
            value.normal_(0, 0.2)
        elif is_scale(name, value):
            value.uniform_(0.5, 1.5)
    encoder.load_state_dict(state)
    encoder = encoder.double().eval()
    pixels = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float32)
    stages = {}
    for i in (1, 2, 3, 4):
        layer = getattr(tower, f"layer{i}")
        layer.register_forward_hook(lambda _m, _i, out, n=i: stages.__setitem__(f"stage{n}", out))
    with torch.no_grad():
        pooled = tower(pixels.double())
    target.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"visual.{name}": value.float().contiguous()
        for name, value in encoder.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    save_file(tensors, target / "tower.safetensors")
    expected = {n: x.permute(0, 2, 3, 1).float().numpy() for n, x in stages.items()}
    np.savez_compressed(
        target / "expected.npz",
        pixels=pixels.permute(0, 2, 3, 1).numpy(),
        pooled=pooled.numpy(),
        **expected,
    )


def is_scale(name: str, value) -> bool:
    """Is this the scale of a batch norm?"""
    return name.endswith("weight") and value.ndim == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
