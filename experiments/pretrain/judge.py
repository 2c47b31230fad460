"""What a CLIP folder is worth in use, by sweep.py: plain prompts, memory, trained prompts, `ours`.

The memory compares the CLIP's own tokens, or the teacher's (`memory, teacher`; in `ours` too, as
with the CLIP that ships). For a random encoder judge the export of a run of no steps. No
training decision may be read from these numbers; the card says when they were looked at.
"""

from argparse import Namespace
from pathlib import Path

import numpy as np
import sweep
import tables

CONFIGS = ("busi", "brain_mri", "chest_xray")
TEACHER = {"memory_encoder": "efficientnet-lite0"}
VARIANTS = {
    "zero_shot": {"method": "zero_shot"},
    "memory": {"method": "memory"},
    "memory, teacher": {"method": "memory"} | TEACHER,
    "learned": {"branches": ("learned",)},
    "ours": TEACHER,
}


def judge(
    folders: list[Path],
    runs: Path,
    fields: list[str],
    configs: list[Path],
    ks: tuple[int, ...] = (4, 16),
    draws: int = 5,
) -> str:
    """A Markdown table of image AUROC, mean and sd over draws, by folder and data set.

    Args:
        folders: CLIPs to judge, in Hugging Face format.
        runs: folder of the runs; finished ones are not repeated.
        fields: FIELD=VALUE of all runs, such as data.root=/data.
        configs: config files of the data sets.
        ks: numbers of supports.
        draws: support draws, seeds 0 and on.
    """
    head = ["model", "set", *(f"{v} K={k}" for k in ks for v in VARIANTS)]
    rows = []
    for folder in folders:
        own = [*fields, f"clip.checkpoint={folder}", "explained=0"]
        args = Namespace(runs=runs / folder.name, set=own, fields=VARIANTS, archived={})
        for config in configs:
            cells = []
            for k in ks:
                for variant in VARIANTS:
                    job = sweep.Job(str(config), k, 0, "clean", variant)
                    jobs = [job._replace(seed=seed) for seed in range(draws)]
                    for job in jobs:
                        sweep.run(args, job, wait=True)
                    read = [sweep.read(args.runs / j.name, j.seed) for j in jobs]
                    scores = [tables.value(r, tables.MAIN) for r in read]
                    cells.append(f"{np.mean(scores):.3f} ± {np.std(scores):.3f}")
            rows.append([folder.name, config.stem, *cells])
    return "\n".join(tables.table("Judged", head, rows)[2:])
