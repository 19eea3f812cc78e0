"""Items of a run under what clients have put: what is kept is bounded, and what is deleted is gone."""

import pytest
from PIL import Image

from mllm_msr.data.images import encode
from mllm_msr.modeling.inputs import Candidate
from mllm_msr.serving import catalogue as module
from mllm_msr.serving.catalogue import ServedCatalogue
from mllm_msr.serving.store import StoredItem


def image(value: int) -> Image.Image:
    return Image.new("RGB", (50, 40), (value, 0, 0))


@pytest.fixture
def catalogue() -> ServedCatalogue:
    run = {name: Candidate(name, name.upper(), image=image(place)) for place, name in enumerate("abcdef")}
    titles, summaries = {name: name.upper() for name in run}, {name: f"of {name}" for name in run}
    stored = {"a": encode(Image.effect_mandelbrot((64, 48), (-2, -1, 1, 1), 9).convert("RGB"))}
    columns = {"year": {"a": 1, "b": 2}}
    return ServedCatalogue(run, titles, summaries, columns, stored.get, lambda shown: shown)


def test_what_is_put_stands_over_what_the_run_has(catalogue: ServedCatalogue) -> None:
    assert catalogue["a"].title == "A" and catalogue.value("a", "year") == 1
    changes = [
        StoredItem("a", "new a", summary="said", columns={"kind": "x"}, version=1),
        StoredItem("b", deleted=True, version=2),
        StoredItem("z", "Z", version=3),
    ]
    catalogue.apply(changes)
    assert catalogue.version == 3 and list(catalogue) == ["c", "d", "e", "f", "a", "z"] and len(catalogue) == 6
    assert catalogue["a"].title == "new a" and catalogue["a"].image.size == (64, 48) and catalogue["z"].image is None
    assert (catalogue.summary("a"), catalogue.summary("b"), catalogue.summary("c")) == ("said", None, "of c")
    assert catalogue.title("b") == "" and catalogue.value("a", "year") is None and catalogue.value("a", "kind") == "x"
    assert catalogue.has_column("year") and catalogue.has_column("kind") and not catalogue.has_column("none")
    with pytest.raises(KeyError, match="'b' is not in the catalogue"):
        catalogue["b"]


def test_images_are_kept_up_to_so_many_bytes(catalogue: ServedCatalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 20_000)  # two images of 50 x 40, each with what is around it
    first = catalogue["a"]
    assert catalogue["a"] is first
    for name in "bcdef":
        assert catalogue[name].title == name.upper() and catalogue.nbytes <= 20_000
    assert list(catalogue._kept) == ["e", "f"]
    catalogue.apply([StoredItem(name, deleted=True, version=1) for name in "abcdef"])
    assert catalogue.nbytes == 0 and len(catalogue) == 0
