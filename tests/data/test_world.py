"""The demo's world: what is visible is in the image only, and tastes explain choices."""

import numpy as np
import pytest

from mllm_msr.data.sources.demo import DemoSource, read_demo, true_utilities
from mllm_msr.data.sources.world import (
    COLOURS,
    SIZE,
    TOPICS,
    TRAITS,
    DrawnItem,
    condense,
    describe,
    draw,
    make_world,
    preference_text,
    random_item,
)

VISIBLE = ("colour", "pattern", "kind", "badge")


def thing(seed: int = 1, **traits: str) -> DrawnItem:
    plain = {"colour": "red", "pattern": "plain", "kind": "mug", "badge": "star", "topic": "jazz"}
    return DrawnItem("i", {**plain, **traits}, "Alder Jazz", "Made for swing lovers", seed)


def test_words_give_nothing_visible_away():
    rng = np.random.default_rng(0)
    items = [random_item(rng, str(k)) for k in range(500)]
    words = {word.lower() for item in items for word in f"{item.title} {item.text}".split()}
    assert not words & {value for trait in VISIBLE for value in TRAITS[trait]}
    for item in items:
        assert any(word in f"{item.title} {item.text}".lower() for word in TOPICS[item.traits["topic"]])
    for trait in VISIBLE:  # and makers, the only other words of a title, are independent of what is drawn
        table = np.zeros((len(TRAITS[trait]), 24))
        makers = sorted({item.title.split()[0] for item in items})
        for item in items:
            table[TRAITS[trait].index(item.traits[trait]), makers.index(item.title.split()[0])] += 1
        expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
        freedom = (table.shape[0] - 1) * (table.shape[1] - 1)
        assert ((table - expected) ** 2 / expected).sum() < freedom + 4 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("trait", VISIBLE)
def test_every_visible_trait_changes_the_image(trait):
    images = [np.asarray(draw(thing(**{trait: value})), dtype=float) for value in TRAITS[trait]]
    for a, first in enumerate(images):
        for second in images[:a]:
            assert np.abs(first - second).mean() > 1.5
    assert np.array_equal(images[0], np.asarray(draw(thing(**{trait: TRAITS[trait][0]})), dtype=float))


@pytest.mark.parametrize("colour", COLOURS)
def test_the_colour_is_the_colour(colour):
    image = draw(thing(colour=colour))
    assert image.size == (SIZE, SIZE) and image.mode == "RGB"
    pixels = np.asarray(image, dtype=float).reshape(-1, 3)
    near = {name: (np.abs(pixels - np.array(value)).sum(1) < 60).sum() for name, value in COLOURS.items()}
    assert max(near, key=lambda name: near[name]) == colour


def test_users_choose_by_taste_and_never_twice():
    world = make_world(3, n_users=80, n_items=120)
    assert all(len(set(history)) == len(history) for history in world.histories)
    assert {11, 20} >= {min(map(len, world.histories)), max(map(len, world.histories))}
    above = [
        (world.utilities[user, history[-1]] > np.delete(world.utilities[user], history)).mean()
        for user, history in enumerate(world.histories)
    ]
    assert np.mean(above) > 0.9
    again = make_world(3, n_users=80, n_items=120)
    assert again.histories == world.histories and np.array_equal(again.utilities, world.utilities)


def test_raw_data_and_oracle_speak_of_the_same_world():
    log = read_demo(seed=3, n_users=5, n_items=40).interactions.lazy().collect()
    world = make_world(3, 5, 40)
    assert log.filter(user_id="u0002")["item_id"].to_list() == [
        world.items[item].item_id for item in world.histories[2]
    ]
    pairs = log.head(3).select("user_id", "item_id")
    source = DemoSource(seed=3, n_users=5, n_items=40)
    assert true_utilities(source, pairs) == pytest.approx(world.utilities[0, world.histories[0][:3]])


def test_a_preference_keeps_what_returns_and_forgets_what_does_not():
    red, blue = thing().traits, thing(colour="blue").traits
    first = condense([red, red, blue], None)
    assert first["colour"] == ["red", "blue"]
    second = condense([thing(colour="green").traits] * 3, first)
    assert second["colour"] == ["green", "red"]
    assert preference_text(first) == "Likes red, blue; plain; mug; star; jazz"
    assert describe(red) == "red plain mug with star about jazz"
