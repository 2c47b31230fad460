"""The fields, their arguments, and what is derived from them."""

import contextlib

import pytest
from ml_collections import ConfigDict

from medclip_jax import config, config_validation, main
from medclip_jax.config_validation import FIXED_METHODS
from medclip_jax.errors import ConfigError


def test_arguments_are_typed():
    assert config.parse_arg("k=8,seed=3,method=memory,root=/a b/c") == {
        "k": 8,
        "seed": 3,
        "method": "memory",
        "root": "/a b/c",
    }
    assert config.parse_arg("") == {}


@pytest.mark.parametrize("arg, named", [("kk=3", "'kk'"), ("k=many", "k='many'"), ("k", "k=''")])
def test_arguments_that_cannot_be_used_are_named(arg, named):
    with pytest.raises(ConfigError) as caught:
        config.parse_arg(arg)
    assert named in str(caught.value)


def test_a_config_holds_the_differences_of_its_data_set():
    c = config.base("k=8,root=/data", name="busi", anatomy="breast")
    assert (c.k, c.data.name, c.data.anatomy, c.data.root) == (8, "busi", "breast", "/data")
    assert c.data.pool == config.base().data.pool


def test_a_misspelt_field_cannot_be_set():
    with pytest.raises((KeyError, AttributeError), match="steps"):
        config.base().stepz = 3


@pytest.mark.parametrize(
    "k, batch, steps, expected",
    [
        (16, 0, 0, (8, 100)),
        (4, 0, 0, (4, 100)),
        (10, 4, 0, (4, 100)),
        (1, 0, 0, (1, 100)),
        (16, 0, 7, (8, 7)),
    ],
)
def test_batch_and_steps_follow_from_k(k, batch, steps, expected):
    """Joint training takes as many steps whatever K is."""
    c = config.base(f"k={k}")
    c.update({"batch": batch, "steps": steps})
    done = config.resolve(c)
    assert (done.batch, done.steps) == expected
    assert (c.batch, c.steps) == (batch, steps)  # the given one is left alone


@pytest.mark.parametrize("learner", ["maml", "fomaml", "anil"])
def test_the_other_learners_take_two_hundred_passes(learner):
    c = config.base("k=16")
    c.learner = learner
    assert config.resolve(c).steps == 400 // config.gradients(config.resolve(c))


def test_the_peers_preset_keeps_its_epochs():
    assert config.resolve(config.base("k=16,method=mediclip")).steps == 400


@pytest.mark.parametrize("method", FIXED_METHODS)
def test_what_learns_nothing_takes_no_steps(method):
    assert config.resolve(config.base(f"method={method}")).steps == 0


def test_joint_is_ours_without_episodes():
    c = config.base("method=joint,k=4")
    done, ours = config.resolve(c), config.resolve(config.base("k=4"))
    assert (done.learner, done.steps) == ("joint", ours.steps)
    c.learner = "maml"
    with pytest.raises(ConfigError, match="method=joint always trains jointly: give method=ours"):
        config.resolve(c)


def test_without_supports_ours_is_zero_shot():
    done = config.resolve(config.base("k=0"))
    assert (done.method, done.steps, done.k) == ("zero_shot", 0, 0)
    for method in ("memory", "mediclip"):
        with pytest.raises(ConfigError, match="config.k is 0"):
            config.resolve(config.base(f"k=0,method={method}"))


@pytest.mark.parametrize("method", ["mediclip", "paper"])
def test_a_preset_gives_its_fields_and_no_other(method):
    given, plain = config.base(f"method={method},k=4"), dict(config.flat(config.base("k=4")))
    fields = dict(config.flat(ConfigDict(config.PRESETS[method])))
    assert dict(config.flat(given)) == plain | fields | {"method": method}
    assert config.departures(given) == []


@pytest.mark.parametrize("method", ["mediclip", "paper"])
@pytest.mark.parametrize("first", [True, False], ids=["method first", "field first"])
def test_a_field_that_is_set_wins_over_the_preset(method, first):
    """Every field of a preset, also where it is set to what it is without one."""
    plain = dict(config.flat(config.base()))
    for name, value in config.flat(ConfigDict(config.PRESETS[method])):
        if value == plain[name]:
            continue
        c = config.base()
        for part in (("method", method), (name, plain[name]))[:: 1 if first else -1]:
            c.update_from_flattened_dict(dict([part]))
        assert dict(config.flat(c))[name] == plain[name]
        assert config.departures(c) == [f"{name} = {plain[name]!r} (preset: {value!r})"]


def test_a_field_of_the_command_line_wins_in_any_order():
    flags = ["--config.learner=joint", "--config.method=paper", "--config.score.tiles=1"]
    for order in (flags, flags[::-1]):
        c = main.parse(["main", "--config=configs/phantom.py", "--workdir=w", *order]).config
        done = config.resolve(c)
        assert (done.method, done.learner, done.score.tiles) == ("paper", "joint", 1)
        assert done.model.refine and done.model.form == "distance"
    own = config.base("method=paper", name="folder", recipe="clahe")  # of a config file
    assert config.resolve(own).data.recipe == "clahe"
    copied = config.base("method=paper").copy_and_resolve_references()
    copied.method = "ours"
    assert copied.model.refine  # values, no longer defaults


@pytest.mark.parametrize(
    "modality, recipe, elastic",
    [("breast ultrasound", "ultrasound", True), ("Brain MRI", "mri", True)]
    + [("chest X-ray", "xray", False), ("retinal OCT", "zscore", False), ("CT", "ct", False)]
    + [
        ("chest X ray", "xray", False),
        ("mammography", "mammography", False),
        ("computed tomography", "ct", False),
        ("X-ray computed tomography", "ct", False),
        ("prostate mpMRI", "mri", True),
        ("MR angiography", "mri", True),
    ],
)
def test_the_papers_preprocessing_and_augmentation_follow_the_modality(modality, recipe, elastic):
    done = config.resolve(config.base("method=paper", name="folder", modality=modality))
    assert done.data.recipe == recipe and ("elastic" in done.augment) == elastic
    assert done.model.language == "embedded"
    c = config.base("method=paper")
    c.clip.checkpoint = "openai/clip-vit-large-patch14"
    assert config.resolve(c).model.language == "fresh"


@pytest.mark.parametrize(
    "field, value",
    [
        ("k", -1),
        ("memory_coreset", 0.0),
        ("loss.dice", float("nan")),
        ("seed", -1),
        ("batch", -1),
        ("steps", -5),
        ("checkpoint_every", 0),
        ("method", "ous"),
        ("model.dropout", 1.0),
        ("score.top", 1.5),
        ("score.passes", 0),
        ("prompts.context", -1),
        ("prompts.position", "between"),
        ("prompts.phrases", "poems"),
        ("synthesis.variants", -1),
        ("synthesis.preset", "medklip"),
        ("model.form", "round"),
        ("calibration.alpha", 0.0),
        ("calibration.alpha", 1.5),
        ("calibration.pixel_rate", 2.0),
        ("clip.dtype", "float8"),
        ("data.fit", "squeeze"),
        ("learning_rate", -1.0),
    ],
)
def test_values_that_cannot_be_used_are_named(field, value):
    c = config.base()
    group, _, name = f".{field}".rpartition(".")
    (c[group.strip(".")] if group.strip(".") else c)[name] = value
    with pytest.raises(ConfigError) as caught:
        config.resolve(c)
    assert f"config.{field} is {value!r}" in str(caught.value)


def test_an_ontology_that_no_phrase_reads_is_refused():
    c = config.base()
    c.prompts.ontology_file = "own.csv"
    with pytest.raises(ConfigError, match="ontology_file is for prompts.phrases=ontology"):
        config.resolve(c)
    c.prompts.phrases = "ontology"
    assert config.resolve(c).prompts.ontology_file == "own.csv"


def test_conditions_joined_by_commas_are_no_single_condition():
    """`--config.data.conditions=tumour,cyst` is one text: prompts said "image with tumour,cyst"."""
    flags = ["main", "--config=configs/phantom.py", "--workdir=w"]
    for text in ("tumour,cyst", "tumour, cyst", "('mass','tumour, cyst')"):
        c = main.parse([*flags, f"--config.data.conditions={text}"]).config
        with pytest.raises(ConfigError, match=r"conditions has \['tumour, ?cyst'\]: give each"):
            config.resolve(c)
    c.prompts.phrases = "ontology"  # whose names may have commas, and which refuses others
    assert config.resolve(c).data.conditions == ("mass", "tumour, cyst")
    for text in ("tumour", "('tumour','cyst')"):
        config.resolve(main.parse([*flags, f"--config.data.conditions={text}"]).config)


def test_the_cache_is_where_it_was_named(monkeypatch, tmp_path):
    monkeypatch.setenv("MEDCLIP_CACHE", str(tmp_path / "env"))
    assert config.cache_folder(str(tmp_path / "flag")) == tmp_path / "flag"
    assert config.cache_folder("") == tmp_path / "env"
    monkeypatch.delenv("MEDCLIP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert config.cache_folder("") == tmp_path / "xdg" / "medclip_jax"


def test_flat_names_every_field_once():
    names = [name for name, _ in config.flat(config.base())]
    assert len(names) == len(set(names)) and {"k", "data.root", "model.dropout"} <= set(names)


@pytest.mark.parametrize(
    "method, preset",
    [("ours", "masses"), ("joint", "masses"), ("paper", "medclip"), ("mediclip", "mediclip")],
)
def test_dark_masses_are_of_our_own_methods_alone(method, preset):
    """The published ones keep the kinds of anomalies that they were published with."""
    assert config.resolve(config.base(f"method={method}")).synthesis.preset == preset


def test_tensorboard_without_its_extra_is_refused_before_the_run(monkeypatch):
    c = config.base()
    c.tensorboard = True
    monkeypatch.setattr("medclip_jax.config_validation.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"pip install 'medclip-jax\[tensorboard\]'"):
        config.resolve(c)


BAD = {
    int: ("-2", "x", "1e300", "9" * 20, "nan", "", "1.5", "()"),
    float: ("-1", "x", "1e300", "nan", "inf", "", "-inf", "()"),
    bool: ("x", "2", "", "nan"),
    tuple: ("((1,),)", "(None,)", "(1.5,)"),
    str: ("x" * 5000, "a\0b"),
}
WORDS = "data.modality", "data.anatomy", "data.conditions"


@pytest.mark.parametrize("name, default", list(config.flat(config.base())), ids=lambda x: str(x))
def test_no_field_takes_a_value_of_another_kind(name, default):
    """Wrong type, negative, huge, not a number, empty: one sentence that names the field."""
    bad = [*BAD[type(default)], *["", " "] * (name in WORDS)]
    if isinstance(default, str) and name not in config_validation.PATHS:
        bad.append("\udcff")
    if name == "explanation.layer":  # counted from the end too; the encoder knows how many
        bad = [value for value in bad if value not in ("-2", "9" * 20)]
    for value in bad:
        argv = ["main", "--config=configs/phantom.py", "--workdir=w", f"--config.{name}={value}"]
        with pytest.raises(ConfigError) as refused:
            config.resolve(main.parse(argv).config)
        said = str(refused.value)
        assert "\n" not in said and (name in said or name.split(".")[-1] in said), (value, said)


def test_tiles_are_refused_where_maps_reach_from_corner_to_corner():
    c = config.base("k=4,method=mediclip", name="busi")
    c.score.tiles = 2
    with pytest.raises(ConfigError, match="give score.corners=False"):
        config.resolve(c)
    c.score.corners = False
    assert config.resolve(c).score.tiles == 2


@pytest.mark.parametrize("teacher, taught", [("", False), ("w", True)])
def test_weights_of_which_none_teaches_a_score_are_refused(teacher, taught):
    c = config.base("k=4")
    c.loss.update({"focal": 0.0, "dice": 0.0, "align": 0.0, "prompt": 1.0})
    c.teacher = teacher  # its logits are learned from
    with contextlib.nullcontext() if taught else pytest.raises(ConfigError, match="nothing is lea"):
        config.resolve(c)
    c.method, c.teacher = "memory", ""  # nothing trains
    assert config.resolve(c).steps == 0


META = {"meta.sources": ("busi",), "branches": ("meta", "zero_shot"), "learner": "maml"}


@pytest.mark.parametrize(
    "method, fields, named",
    [
        ("ours", {"learner": "maml", "meta.tasks": 2, "memory_coreset": 0.5, "steps": 3}, {}),
        ("ours", {"prompts.context": 0, "prompts.init": "a b"}, {"prompts.init": "context is 0"}),
        ("ours", {"branches": ("memory",), "teacher": "w"}, {"teacher": "nothing trains"}),
        ("ours", {"branches": ("learned",), "memory_encoder": ""}, {"memory_encoder": "no branch"}),
        ("mediclip", {"meta.tasks": 2}, {"meta.tasks": "learner is joint"}),
        ("paper", {"meta.tasks": 3, "score.tiles": 1}, {}),
        ("memory", {"learner": "maml", "steps": 9}, dict.fromkeys(("learner", "steps"), "nothing")),
        ("grey_level", {"loss.distill": 0.5}, {"loss.distill": "nothing trains"}),
        ("memory", {"prompts.phrases": "words"}, {"prompts.phrases": "no branch has prompts"}),
        ("zero_shot", {"prompts.phrases": "words", "model.form": "distance"}, {}),
        ("zero_shot", {"branches": ("memory",)}, {"branches": "method zero_shot is its own"}),
        ("ours", {"data.uncertain": "positive"}, {"data.uncertain": "no data set is CheXpert"}),
        ("ours", {"data.uncertain": "positive", "meta.data": ("chexpert=x",)}, {}),
        ("ours", META | {"steps": 9, "meta.tasks": 2, "prompts.phrases": "words"}, {}),
        (
            "ours",
            META | {"batch": 2, "loss.dice": 0.5, "meta.shots": 3, "prompts.context": 4},
            dict.fromkeys(("batch", "loss.dice", "meta.shots", "prompts.context"), "meta trains"),
        ),
    ],
)
def test_a_field_that_nothing_reads_is_said(method, fields, named):
    c = config.base(f"k=4,method={method}", name="folder")
    c.update_from_flattened_dict(fields)
    said = config.unused_fields(c, config.resolve(c))
    assert len(said) == len(named)
    for line, (field, why) in zip(said, named.items(), strict=True):
        assert line.startswith(f"config.{field} has no effect: ") and why in line


@pytest.mark.parametrize("field", ["augment", "score.map_filter"])
def test_a_name_given_twice_is_an_error(field):
    name = {"augment": "flip", "score.map_filter": "median"}[field]
    c = config.base("k=4")
    c.update_from_flattened_dict({field: f"{name}=1,{name}=3"})
    with pytest.raises(ConfigError, match=f"config.{field} has '{name}=3': give any of .* once"):
        config.resolve(c)
