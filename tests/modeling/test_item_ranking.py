"""What ranks by item vectors: the same scores kept, made anew and read again; new items beside all others."""

import json

import pytest
import torch
from tiny_rankers import IDS, N_ITEMS, SIZE, content, make

from mllm_msr.modeling.item_ranking import ITEMS, AlikeItem, ItemRanker
from mllm_msr.modeling.neighbours import nearest_chosen
from mllm_msr.modeling.score_fusion import ScoreFusion, frequency_buckets

HISTORIES = [["film-3", "film-7", "film-29"], ["film-0"], [], [f"film-{code}" for code in range(20)]]


def again(ranker: ItemRanker) -> ItemRanker:
    """Another ranker of the same weights, with nothing kept."""
    other = ItemRanker(json.loads(json.dumps(ranker.to_config())), ranker.item_ids)
    other.load_state_dict(ranker.state_dict())
    return other


def test_scores_are_those_of_the_members_and_their_weighted_sum():
    ranker = make()
    codes, skipped = ranker.read(HISTORIES)
    assert codes[0].tolist()[:4] == [3, 7, 29, -1] and skipped.tolist() == [0] * 4
    head, alike = ranker.members["sequence_head"], ranker.members["likeness"]
    scores = ranker.member_scores(HISTORIES)
    assert torch.allclose(scores["sequence_head"], head.score_catalogue(codes), atol=1e-6)
    directions = alike.item_vectors()
    assert torch.allclose(scores["likeness"][0], (directions[7] + directions[29]) / 2 @ directions.T, atol=1e-6)
    assert not scores["likeness"][2].any()  # of nobody
    stacked = torch.stack([scores[name] for name in ranker.fusion.members], dim=-1)
    fused = ranker.score(HISTORIES)
    assert torch.allclose(fused, ranker.fusion(stacked, frequency_buckets(ranker.counts)), atol=1e-5)
    shares = ranker.shares(HISTORIES)
    assert list(shares) == [*ranker.fusion.members, "bias"]
    assert torch.allclose(torch.stack(list(shares.values())).sum(dim=0), fused, atol=1e-5)
    some = ["film-9", "film-0"]
    assert torch.allclose(ranker.score(HISTORIES, some), fused[:, [9, 0]], atol=1e-6)
    assert torch.allclose(ranker.score(HISTORIES, some, by="likeness"), scores["likeness"][:, [9, 0]], atol=1e-6)
    assert torch.equal(ranker.score_codes(torch.empty(2, 0, dtype=torch.int64))[1], ranker.score([[]])[0])
    assert ranker.score([], some).shape == (0, 2) and ranker.score(HISTORIES, []).shape == (4, 0)


def test_histories_scored_at_a_time_make_no_difference(monkeypatch):
    whole = make().score(HISTORIES)
    monkeypatch.setattr("mllm_msr.modeling.item_ranking.PAIRS", 2 * N_ITEMS)
    assert torch.allclose(make().score(HISTORIES), whole, atol=1e-6)


@pytest.mark.parametrize("settings", [{}, {"gate": True}, {"encoder": "gru"}, {"join": "concatenation"}])
def test_kept_vectors_score_as_vectors_made_anew_after_items_came_changed_and_went(settings):
    ranker = make(**settings)
    before = ranker.score(HISTORIES)
    identity = ranker.members["sequence_head"].identity.clone()
    ranker.put_items(["new", "film-5"], content(2, seed=7))
    ranker.remove_items(["film-2", "film-3"])
    assert ranker.item_ids == [*(item for item in IDS if item not in ("film-2", "film-3")), "new"]
    histories = [["film-5", "new", "film-1"], *HISTORIES[1:3]]
    kept = ranker.score(histories)
    assert torch.allclose(kept, again(ranker).score(histories), atol=1e-6)
    stay = [IDS.index(item) for item in ranker.item_ids if item in IDS and item != "film-5"]
    assert torch.allclose(ranker.score(HISTORIES[1:2], [IDS[code] for code in stay]), before[1:2, stay], atol=1e-6)
    head = ranker.members["sequence_head"]
    assert torch.equal(head.identity[ranker.codes_of(["film-5"])][0], identity[5])  # a changed item is still itself
    assert not head.identity[-1].any() and ranker.counts[-1] == 0
    assert head.config.n_items == len(ranker) == 29


def test_neighbours_are_kept_saved_and_found_again_as_items_come_change_and_go():
    ranker = make("sequence_head", "likeness", neighbours=3)
    head, before = ranker.members["sequence_head"], ranker.score(HISTORIES)
    ranker.put_items(["new"], ranker.content[5:6].float())
    assert head.near[-1].tolist()[0] == 5 and torch.allclose(ranker.score(HISTORIES)[:, :N_ITEMS], before, atol=1e-6)
    near = [[ranker.item_ids[code] for code in row] for row in head.near.tolist()]
    ranker.remove_items(["film-5", "film-0"])
    for item, row in zip(ranker.item_ids, head.near.tolist(), strict=True):
        left = [ranker.item_ids[code] if code >= 0 else "film-5" for code in row]
        assert left == near[[*IDS, "new"].index(item)]
    assert torch.allclose(ranker.score(HISTORIES[:2]), again(ranker).score(HISTORIES[:2]), atol=1e-6)
    ranker.put_items(["film-9"], ranker.content[-1:].float())
    changed = ranker.codes_of(["film-9"])
    expected = nearest_chosen(ranker.content[changed], changed, ranker.content, ranker.counts, 3)
    assert torch.equal(head.near[changed], expected) and changed not in expected


@pytest.mark.parametrize("settings", [{}, {"neighbours": 3}])
def test_a_new_item_scores_as_one_of_the_catalogue_that_nobody_chose(settings):
    ranker = make(*(["sequence_head"] if settings else []), **settings)
    twin = ranker.content[:1].float()  # of film-0
    ranker.put_items(["twin"], twin.tolist())
    scores = ranker.score(HISTORIES)
    assert torch.allclose(scores[:, 0], scores[:, -1], atol=1e-6)
    as_read = ranker.score([["film-3", "twin"], ["film-3", "film-0"]])
    assert torch.allclose(as_read[0], as_read[1], atol=1e-6)


def test_unknown_items_are_skipped_in_histories_and_named_as_candidates():
    ranker = make()
    codes, skipped = ranker.read([["gone", "film-1", "gone"], ["gone"]])
    assert codes.tolist() == [[1], [-1]] and skipped.tolist() == [2, 1]
    assert torch.equal(ranker.score([["gone", "film-1"]]), ranker.score([["film-1"]]))
    with pytest.raises(ValueError, match="'gone' is none of the 30 items"):
        ranker.score([["film-1"]], ["film-1", "gone"])
    with pytest.raises(ValueError, match="'gone' and 1 others are none of"):
        ranker.remove_items(["gone", "went"])
    for histories in ("film-1", ["film-1"]):
        with pytest.raises(TypeError, match="histories are lists of item ids, one list for each user"):
            ranker.score(histories)
    with pytest.raises(ValueError, match=r"by='sasrec' is not known; there are fused, sequence_head"):
        ranker.score([[]], by="sasrec")


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (["a", "a"], content(2), "comes twice"),
        (["a"], content(2), r"the vectors of 1 items are \(2, 6\), not \(items, 6\)"),
        (["a", "b"], torch.stack([torch.ones(SIZE), torch.full((SIZE,), 1e6)]), "the vector of item 'b' has a number"),
    ],
)
def test_vectors_that_cannot_be_are_refused_and_change_nothing(ids, vectors, message):
    ranker = make()
    with pytest.raises(ValueError, match=message):
        ranker.put_items(ids, vectors)
    assert ranker.item_ids == IDS and len(ranker.content) == N_ITEMS


def test_identity_alone_takes_no_new_items():
    ranker = make("identity_only")
    assert ranker.score(HISTORIES).shape == (4, N_ITEMS)
    with pytest.raises(ValueError, match="identity alone: they cannot rank new ones"):
        ranker.put_items(["a"], content(1))


def test_the_nearest_items_of_a_history_explain_an_item():
    ranker = make()
    ranker.put_items(["twin"], ranker.content[7:8].float())
    first, second = ranker.nearest("twin", ["film-3", "gone", "film-7", "film-7", "film-9"], k=2)
    assert first == AlikeItem("film-7", pytest.approx(1.0)) and first.cosine > second.cosine
    directions = ranker.vectors("likeness")
    assert second.cosine == pytest.approx(float(directions[ranker.codes_of([second.item_id])] @ directions[-1]))
    assert ranker.nearest("twin", []) == []
    assert len(make("content_only").nearest("film-1", ["film-3", "film-7"])) == 2


def test_it_stays_as_it_is_in_a_model_that_is_trained_and_has_another_dtype():
    ranker = make(dropout=0.5)
    around = torch.nn.ModuleDict({"ranker": ranker, "other": torch.nn.Linear(2, 2)})
    expected = ranker.score(HISTORIES)
    around.to(torch.bfloat16).train()
    assert around["other"].weight.dtype == torch.bfloat16 and not any(module.training for module in ranker.modules())
    assert torch.equal(ranker.score(HISTORIES), expected)
    assert not any(value.requires_grad for value in ranker.parameters())
    assert ranker.content.dtype == torch.float16 and ranker.members["likeness"].content is ranker.content


def test_what_is_saved_comes_back_and_content_is_in_it_once(tmp_path):
    ranker = make(gate=True)
    ranker.put_items(["new é"], content(1))
    ranker.save_pretrained(tmp_path)
    other = ItemRanker.from_pretrained(tmp_path)
    assert other.item_ids == ranker.item_ids and torch.equal(other.counts, ranker.counts)
    assert torch.equal(other.score(HISTORIES), ranker.score(HISTORIES))
    assert [name for name in ranker.state_dict() if name.endswith(("content", "counts"))] == ["content", "counts"]
    assert json.loads((tmp_path / ITEMS).read_text(encoding="utf-8"))["film-4"] == 4
    assert json.loads((tmp_path / "config.json").read_text())["sequence_head"]["n_items"] == N_ITEMS + 1
    other.remove_items(["film-4"])
    other.put_items(["other"], content(1))
    other.save_items(tmp_path)
    with pytest.raises(ValueError, match=r"items.json is not of these weights"):
        ItemRanker.from_pretrained(tmp_path)


def changed(path, change) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(content)), encoding="utf-8")


def in_head(**fields):
    return lambda content: {"sequence_head": {**content["sequence_head"], **fields}}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (ITEMS, lambda table: {f"other-{item}": count for item, count in table.items()}),  # of another catalogue
        (ITEMS, lambda table: dict(list(table.items())[1:])),
        (ITEMS, list),
        (ITEMS, lambda table: dict.fromkeys(table, "many")),
        ("config.json", in_head(heads={"sequence_head": {"hidden": 2}})),
        ("config.json", in_head(heads={"sequence_head": {"colour": "red"}})),
        ("config.json", in_head(fusion=None)),
        ("config.json", lambda content: {"sequence_head": "here"}),
        ("config.json", lambda content: {}),
        ("model.safetensors", None),
        (ITEMS, None),
    ],
)
def test_files_that_are_damaged_or_not_of_one_model_are_refused_in_words(tmp_path, name, change):
    make().save_pretrained(tmp_path)
    path = tmp_path / name
    if change is None:
        path.write_bytes(path.read_bytes()[:-50])  # cut short
    else:
        changed(path, change)
    with pytest.raises(ValueError, match=r"the sequence head cannot be loaded .* save or download them again") as error:
        ItemRanker.from_pretrained(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_belong_together_is_refused():
    ranker = make()
    with pytest.raises(ValueError, match="29 item ids for the vectors of 30 items"):
        ItemRanker.of(IDS[1:], ranker.members, ranker.fusion)
    with pytest.raises(ValueError, match="an item id comes twice"):
        ItemRanker.of([*IDS[1:], IDS[1]], ranker.members, ranker.fusion)
    with pytest.raises(ValueError, match="weighs 'answer', which is no member"):
        ItemRanker.of(IDS, ranker.members, ScoreFusion.alone("answer"))
