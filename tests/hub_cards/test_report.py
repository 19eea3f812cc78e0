"""The report as a reader's browser gets it: whole, escaped, self-contained, and honest about what is missing."""

import dataclasses
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hub_run import SECRETS, change_recipe

from mllm_msr.evaluation.variants import VARIANTS
from mllm_msr.hub_cards.charts import Line, line_chart, nice_ticks
from mllm_msr.hub_cards.figures import roc
from mllm_msr.hub_cards.report import write_report
from mllm_msr.hub_cards.stories import ItemCard, small_image, user_story
from mllm_msr.records.schema import PREFERENCES, SCORES

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Checks that every element is closed in order; keeps texts and attributes."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.attributes = "", []
        self.feed(source)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


@pytest.fixture(scope="module")
def source(finished_run) -> str:
    path = write_report(finished_run)
    assert path == finished_run.report
    assert not list(finished_run.path.glob(".*.partial"))
    return path.read_text()


def test_it_is_whole_and_says_what_the_run_says(source, finished_run):
    page, results = Page(source), finished_run.results()
    for metrics in results.variants.values():
        for estimate in metrics.values():
            assert f"{100 * estimate.value:.1f}" in page.text
    for fact in ("8 users", "10 candidates each", "strict protocol", results.candidate_hash, "k-core", "2 min 22 s"):
        assert fact in page.text
    assert page.text.count("their choice") == 6
    preferences = finished_run.read(PREFERENCES)["preference"]
    assert sum(text in page.text for text in preferences.unique()) >= 6


def test_it_needs_nothing_from_outside(source):
    for tag, attributes in Page(source).attributes:
        assert tag not in ("script", "link", "iframe")
        assert attributes.get("src", "data:image/jpeg").startswith("data:image/jpeg")
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in source and "@import" not in source


def test_what_came_from_data_is_escaped(source):
    assert "<script>" not in source
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; co" in source
    assert "item &lt;b&gt;x9&lt;/b&gt;" in source


def test_no_secret_of_the_recipe_and_no_place_of_this_machine_is_shown(source):
    assert not [secret for secret in SECRETS if secret in source]
    assert "hub_token: &#39;***&#39;" in source and "model: writer" in source and "for example row 3" in source


def test_a_pretrained_backbone_is_named_and_no_path_of_this_machine(make_run, tmp_path):
    run = make_run()
    assert "What the backbone may have known" not in write_report(run).read_text()  # the demo's has read nothing
    for name, words in (
        ("someone/vlm-7b", "someone/vlm-7b was trained"),
        (str(tmp_path), "The model before training was"),
    ):
        run = change_recipe(run, training={"model_name_or_path": name})
        page = write_report(run).read_text()
        assert words in page and str(tmp_path) not in page


def test_every_variant_has_its_colour(make_run):
    run = make_run()
    results = run.results()
    metrics = results.variants["random"]
    every = {**dict.fromkeys(VARIANTS, metrics), "of </style><b>another": metrics}
    dataclasses.replace(results, variants=every).write(run.metrics)
    page = write_report(run).read_text()
    Page(page)
    for variant in VARIANTS.values():
        rule = f".variant-{variant.name.replace('_', '-')} {{ color: var(--{variant.colour});"
        assert rule in page and (not variant.dash or f"stroke-dasharray: {variant.dash};" in page)
    assert "<b>another" not in page


def test_people_stand_first_and_the_contents_lead_to_every_section(source):
    page = Page(source)
    places = [
        page.text.index(words) for words in ("6 users in full", "their choice", "AUC per user", "ROC over all pairs")
    ]
    assert places == sorted(places)
    ids = {attributes.get("id") for _, attributes in page.attributes}
    links = [attributes["href"][1:] for tag, attributes in page.attributes if tag == "a"]
    headings = source.count("<h2")
    assert headings == source.count('<h2 id="') >= 4 and len(links) >= 2 * headings and set(links) <= ids
    assert source.count('<details class="user" open>') == 2 and source.count('<details class="user">') == 4


def test_charts_speak_to_screen_readers(source):
    charts = [part for part in source.split("<figure")[1:] if 'role="img"' in part]
    assert len(charts) == 5
    ids = [attributes["id"] for _, attributes in Page(source).attributes if "id" in attributes]
    assert len(ids) == len(set(ids)) and sum(name.startswith(("title-", "text-")) for name in ids) == 10
    for chart in charts:
        assert chart.count("<title") == chart.count("<desc") == 1


@pytest.mark.parametrize(
    ("missing", "gone", "kept"),
    [
        ("model/log_history.json", "Loss while fine-tuning", "ROC over all pairs"),
        ("scores.parquet", "users in full", "Loss while fine-tuning"),
        ("data/items.parquet", "users in full", "ROC over all pairs"),
        ("data/report.json", "Cleaning", "users in full"),
        ("summaries/items.parquet", "What the images became", "users in full"),
        ("summaries/preferences.parquet", "not yet part of the preference", "users in full"),
        ("provenance.json", "Time of each stage", "users in full"),
    ],
)
def test_a_missing_artefact_leaves_no_gap(make_run, missing, gone, kept):
    run = make_run()
    (run.path / missing).unlink()
    text = Page(write_report(run).read_text()).text
    assert gone not in text
    assert kept in text


def test_without_metrics_it_says_what_to_do(make_run):
    run = make_run()
    run.metrics.unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.json is missing: run `mllm-msr evaluate"):
        write_report(run)


def test_a_broken_image_is_a_placeholder():
    assert small_image(b"no image") is None
    assert small_image(None) is None


def test_roc_passes_equal_scores_in_one_step():
    x, y = roc(np.array([1, 0, 1, 0]), np.array([1.0, 1.0, 1.0, 0.0]))
    assert x.tolist() == [0.0, 0.5, 1.0]
    assert y.tolist() == [0.0, 1.0, 1.0]


def test_the_chosen_item_is_shown_wherever_it_stands_and_last_among_equals():
    items = [f"i{i}" for i in range(12)]
    rows = [("mllm_msr", "u", item, int(not place), 0.0, 0.5) for place, item in enumerate(items)]
    scores = SCORES.frame(rows)
    history = ["a", "b", "c", "d", "e"]
    cards = {item: ItemCard(item, None) for item in (*items, *history)}
    task = {"user_id": "u", "history": history, "first": 1, "last": 12}
    user = user_story(task, scores, {1: "likes a", 2: "likes d", 3: "written later"}, 2, cards)
    assert [entry.place for entry in user.ranking] == [1, 2, 3, 4, 5, 6, 7, 8, 12]
    assert [entry.gap for entry in user.ranking] == [False] * 8 + [True]
    assert user.ranking[-1].chosen
    assert user.rank == "tied for places 1-12"
    assert [block.preference for block in user.blocks] == ["likes a", "likes d"]
    assert [card.title for card in user.recent] == ["e"]
    assert [card.title for card in user_story(task, scores, {}, 2, cards).recent] == history


def test_ticks_are_round_and_inside():
    assert nice_ticks(0, 300) == [0.0, 50.0, 100.0, 150.0, 200.0, 250.0, 300.0]
    assert nice_ticks(0.017, 0.96) == [0.2, 0.4, 0.6, 0.8]


def test_a_chart_is_well_formed_and_inside_its_frame():
    line = Line('<b>"&', [0, 1, 2], [0.0, 10.0, 5.0], "kind-chosen", fill=True, dots=True)
    chart = line_chart(
        [line], title="A & B", description="<d>", x_label="x", y_label="y", x_range=(0, 2), y_range=(0, 10)
    )
    root = ElementTree.fromstring(str(chart))
    assert root.find("svg/title").text == "A & B"
    points = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.iter("circle")]
    assert points[0] == (50.0, 228.0) and points[1][1] == 12.0 and points[2][0] == 348.0
    assert "&lt;b&gt;" in str(chart) and "<b>" not in str(chart)
