"""The house rules that a machine can hold: who may import whom, and how large a room may be."""

import ast
from pathlib import Path

import pytest

import medclip_jax

ROOT = Path(medclip_jax.__file__).parent
FILES = {
    ".".join(p.relative_to(ROOT).with_suffix("").parts): p
    for p in sorted(ROOT.rglob("*.py"))
    if p.name != "__init__.py"
}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
ALL = {"structs", "errors", "files", ""}  # leaves that anyone may import; "" is __version__

# Only these edges are allowed; a module that is not here imports no sibling but the leaves.
MAY_IMPORT = {
    "main": {"config", "data.check", "export", "lock", "predict", "preemption", "processes"}
    | {"report", "sharding", "train"},
    "api": {"data.readers", "explain", "predict", "site", "suppress", "trained"},
    "predict": {"dicom_objects", "dicom_pool", "inputs", "loading", "outputs", "preemption"}
    | {"scoring", "trained"},
    "dicom_pool": {"dicom_objects"},
    "loading": {"data.dicom", "data.readers", "inputs", "outputs", "suppress", "trained"},
    "scoring": {"loading", "marks", "trained"},
    "inputs": {"data.readers"},
    "outputs": {"data.readers", "dicom_objects", "inputs", "marks", "nifti_maps", "overlay", "png"},
    "marks": {"data.readers", "evaluate", "explain", "trained"},
    "nifti_maps": {"data.nifti"},
    "export": {"clip", "scorer", "trained"},
    "trained": {"calibrate", "clip", "detector", "evaluate", "features", "fusion", "score"}
    | {
        "baselines",
        "language",
        "learned_parts",
        "limits",
        "score_fields",
        "scorer",
        "sharding",
        "suppress",
        "train",
    },
    "scorer": {"calibrate", "detector", "limits", "features", "fusion", "language"} | {"suppress"},
    "suppress": {"data.readers"},
    "processes": {"preemption", "spool"},
    "spool": {"files"},
    "site": {"checkpoints", "clip", "data.episodes", "data.readers", "data.synthesis", "detector"}
    | {"data.preprocess", "evaluate", "fit", "learn", "limits", "maml", "model", "score", "train"}
    | {"learned_parts", "score_fields"},
    "groups": set(),
    "distil": {"clip", "data.preprocess", "data.readers", "data.variants", "features", "model"}
    | {"learned_parts", "scorer"},
    "agreement": {"attribution", "calibrate", "data.readers", "detector", "explain", "features"}
    | {"kept", "limits", "score", "sharding"},
    "train": {
        "agreement",
        "baselines",
        "clip",
        "compiled",
        "config",
        "data.datasets",
        "detector",
        "distil",
        "evaluate",
    }
    | {"data.augment", "data.preprocess", "features", "fit", "fusion", "refine", "scorer"}
    | {"language", "scales", "score", "score_fields", "suppress"}
    | {"model", "others", "processes", "prompts", "several", "sharding", "workdir"},
    "others": {"data.augment", "data.datasets", "data.preprocess", "data.presets"}
    | {"data.variants", "features"},
    "several": {"clip", "score"},
    "fit": {"checkpoints", "data.episodes", "features", "groups", "learn", "losses", "maml"}
    | {"language", "model", "preemption"}
    | {"processes", "sharding", "validation", "writer"},
    "validation": {"features", "model", "score", "sharding"},
    "workdir": {"data.datasets"},
    "config": {"learned_parts", "methods", "score_fields"},
    "methods": {"score_fields"},
    "learn": {"data.episodes", "features", "maml", "simclr"},
    "simclr": {"losses", "score"},
    "data.episodes": {"data.synthesis"},
    "attribution": {"clip", "detector", "explain", "score"},
    "thumbnails": {"data.readers", "explain"},
    "baselines": {"data.readers", "detector", "features"},
    "draws": {"intervals", "stats"},
    "lesions": {"data.readers"},
    "limits": {"calibrate", "detector"},
    "evaluate": {
        "agreement",
        "attribution",
        "explain",
        "intervals",
        "lesions",
        "pixels",
        "thumbnails",
        "calibrate",
        "data.readers",
        "detector",
        "features",
        "limits",
        "metrics",
        "processes",
    }
    | {"rejection", "score", "sharding", "spool", "suppress"},
    "detector": {"clip", "data.readers", "data.views", "features", "memory", "model", "score"}
    | {"kept", "thinned"},
    "thinned": {"model", "score"},
    "fusion": {"calibrate", "data.probes", "data.readers", "detector", "features", "kept"}
    | {"scales"},
    "kept": {"features", "processes"},
    "scales": {"calibrate", "data.readers", "detector", "features", "groups", "kept"}
    | {"processes"},
    "memory": {"score"},
    "features": {"clip", "data.readers", "data.synthesis", "groups", "processes", "sharding"}
    | {"data.augment", "data.preprocess", "data.variants"},
    "data.variants": {"data.augment", "data.synthesis"},
    "model": {"clip", "losses", "refine", "score", "several", "simclr"},
    "clip": {"clip_resnet", "language", "openclip", "products", "weights"},
    "openclip": {"clip_resnet", "weights"},
    "prompts": {"ontology"},
    "ontology": {"terminology"},
    "metrics": {"boundary", "pixels", "ranking"},
    "captions": {"results"},
    "command": {"config", "data.presets"},
    "report": {"captions", "command", "figures", "gallery", "intervals", "results", "viewer"},
    "results": {"explain", "gallery", "viewer", "writer"},
    "viewer": {"explain"},
    "gallery": {"explain", "figures"},
    "data.datasets": {"data.builders", "data.chexpert", "data.citations", "data.layouts"}
    | {"data.phantom", "data.pools", "data.readers", "data.twins"},
    "data.chexpert": {"data.layouts"},
    "data.pools": {"data.twins"},
    "data.twins": {"data.readers"},
    "data.builders": {"data.chexpert", "data.citations", "data.layouts"},
    "data.check": {"data.datasets", "data.layouts", "data.pools", "data.readers", "data.twins"},
    "data.readers": {"data.dicom", "data.dicom_files", "data.frame", "data.nifti"}
    | {"data.pillow_images", "data.sources"},
    "data.dicom": {"data.dicom_files", "data.dicom_grey", "data.sources"},
    "data.dicom_files": {"data.codestreams", "data.dicom_grey", "data.sources"},
    "data.dicom_grey": {"data.sources"},
    "data.nifti": {"data.sources"},
    "data.pillow_images": {"data.sources"},
    "data.phantom": {"data.anatomy"},
    "data.synthesis": {"data.alterations", "data.shapes"},
    "data.alterations": {"data.shapes"},
}
ONLY_IN = {
    "flax": {"weights", "clip", "model"},
    "transformers": {"clip", "weights", "prompts"},
    "ml_collections": {"config", "distil", "main", "site", "train", "trained", "workdir"},
    "orbax": {"checkpoints"},
    "tensorflow_datasets": {"data.builders"},
    "pydicom": {"data.dicom", "data.dicom_files", "data.dicom_grey", "dicom_objects", "inputs"},
    "nibabel": {"data.nifti", "nifti_maps"},
    "joblib": {"dicom_pool"},
    "torch": set(),
    "tensorflow": set(),
}
LONG = {("train", "run"), ("fit", "run"), ("config", "base")}
NAMELESS = {"utils", "helpers", "helper", "manager", "base", "factory", "registry", "common"}


def imported(tree: ast.Module) -> set[str]:
    """Full dotted names of everything a module imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import by full name"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def siblings(tree: ast.Module) -> set[str]:
    """Modules of the package that a module imports, without the package's name."""
    inside = {n.removeprefix("medclip_jax.") for n in imported(tree) if n.startswith("medclip_jax")}
    return {n if n in FILES else n.rpartition(".")[0] for n in inside} - {""}


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    assert siblings(TREES[name]) <= MAY_IMPORT.get(name, set()) | ALL


def test_the_allowed_edges_name_modules_and_have_no_cycle():
    later = {m for edges in MAY_IMPORT.values() for m in edges}
    assert set(MAY_IMPORT) <= set(FILES) and later <= set(FILES)

    def walk(name, path=()):
        assert name not in path, " -> ".join([*path, name])
        for other in MAY_IMPORT.get(name, ()):
            walk(other, (*path, name))

    for name in MAY_IMPORT:
        walk(name)


@pytest.mark.parametrize("library", ONLY_IN)
def test_libraries_stay_in_their_rooms(library):
    users = {m for m, tree in TREES.items() if library in {n.split(".")[0] for n in imported(tree)}}
    assert users <= ONLY_IN[library]


@pytest.mark.parametrize("name", FILES)
def test_rooms_are_small_and_named(name):
    assert len(FILES[name].read_text().splitlines()) <= 300
    assert not NAMELESS & set(name.split("."))
    functions = (n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef))
    long = {(name, f.name) for f in functions if f.end_lineno - f.lineno + 1 > 60}
    assert long <= LONG
