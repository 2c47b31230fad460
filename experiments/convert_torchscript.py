"""OpenAI's TorchScript archives (RN50.pt and the like) -> a folder that clip.checkpoint reads.

pip install '.[torch-peers]'
python experiments/convert_torchscript.py RN50.pt --tokenizer CLIP_FOLDER --out rn50

The archive holds no tokenizer: --tokenizer is the folder of any of OpenAI's CLIPs in Hugging Face
format, whose tokenizer they all share. Plain state dicts (open_clip's .pt and .bin) are read too.
Only tensors are taken; open such files only from those you trust, as TorchScript is a program.
"""

import argparse
import json
import shutil
from pathlib import Path

from medclip_jax.clip import hf_weights

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    convert(args.archive, args.tokenizer, args.out)
    print(f"wrote {args.out}: give it as --config.clip.checkpoint")


def convert(archive: Path, tokenizer: Path, out: Path) -> None:
    """Write weights, config and tokenizer files below `out`."""
    import torch
    from safetensors.torch import save_file

    quick = False  # of a plain state dict's activation nothing is known; open_clip's default
    try:
        state, quick = torch.jit.load(archive, map_location="cpu").state_dict(), True
    except RuntimeError:  # not TorchScript
        state = torch.load(archive, map_location="cpu", weights_only=True)
        state = state.get("state_dict", state)
    tensors = {
        name.removeprefix("module."): value.float().contiguous()
        for name, value in state.items()
        if name not in NOT_WEIGHTS and not name.endswith("num_batches_tracked")
    }
    hf_weights.check_tokenizer(tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / hf_weights.OPENCLIP[0])
    config = {"model_cfg": {"quick_gelu": quick}, "preprocess_cfg": {}}
    (out / hf_weights.OPENCLIP[1]).write_text(json.dumps(config))
    for name in hf_weights.SMALL_FILES:
        if name.endswith("config.json") and name != "tokenizer_config.json":
            continue
        if (tokenizer / name).is_file():
            shutil.copyfile(tokenizer / name, out / name)


if __name__ == "__main__":
    main()
