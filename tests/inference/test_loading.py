"""What names the result of an item, so that the same command passes over finished ones."""

from types import SimpleNamespace

from medclip_jax.inference import loading, predictor
from medclip_jax.inference.inputs import Item
from tests.support.predicting import dicom


def test_an_item_whose_files_were_renamed_is_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "FITTED", 0)
    paths = [tmp_path / name for name in ("a.dcm", "b.dcm")]
    encoder = SimpleNamespace(clip=SimpleNamespace(size=8), fit="pad")
    unused: dict = dict.fromkeys(predictor.Predictor._fields)
    plain = predictor.Predictor(**unused | {"window": "", "encoder": encoder})

    def key():
        item = Item("a.dcm (+1)", (*map(str, paths),), "dicom", "a-1", tuple(p.name for p in paths))
        job = loading.load(item, plain, tmp_path, "stamp")
        assert not job.error
        return job.content().key

    for number, path in enumerate(paths, start=1):
        dicom(path, number)
    before = key()
    assert key() == before
    paths[1] = paths[1].rename(tmp_path / "c.dcm")
    assert key() != before
