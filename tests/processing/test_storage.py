import pytest

from mllm_msr.processing.storage import digest, folder_digest, whole_folder


def test_a_folder_appears_whole_or_stays_as_it_was(tmp_path):
    target = tmp_path / "data"
    with whole_folder(target) as folder:
        (folder / "a").write_text("1")
    with pytest.raises(RuntimeError), whole_folder(target) as folder:
        (folder / "a").write_text("2")
        raise RuntimeError
    assert [path.read_text() for path in target.iterdir()] == ["1"]


def test_digests_tell_contents_apart(tmp_path):
    assert digest("a", "b") != digest("ab") != digest(["ab"], None)
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    (tmp_path / "a").write_text("1")
    before = folder_digest(tmp_path)
    (tmp_path / "a").write_text("2")
    assert folder_digest(tmp_path) != before
