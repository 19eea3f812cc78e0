"""One self-contained HTML page about a finished run, for a person: no network, no script, light and dark, any width.

Everything that came from data passes through Jinja's autoescaping or markupsafe; artefacts that a run does not have
leave no gap in the page.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mllm_msr.hub_cards.facts import RunFacts, slug
from mllm_msr.hub_cards.figures import (
    loss_chart,
    metrics_chart,
    reliability_chart,
    score_charts,
    slice_charts,
    style,
)
from mllm_msr.hub_cards.findings import conditions, findings, headline
from mllm_msr.hub_cards.stories import ranked_by, summary_examples, user_stories
from mllm_msr.hub_cards.view import TableView, in_order, results_table, sections, variant_of
from mllm_msr.records.public import public_recipe, public_text
from mllm_msr.records.run import RunFolder
from mllm_msr.records.schema import SCORES
from mllm_msr.records.sections import OURS
from mllm_msr.records.storage import write_text

EVIDENCE = "Where it works, and whether its scores mean something"


def write_report(run: RunFolder) -> Path:
    """Write ``report.html`` from the artefacts of a run and return its path; whatever is missing is left out.

    Raises:
        FileNotFoundError: the run has not been evaluated; the message names the command.
    """
    results, facts = run.results(), RunFacts.read(run)
    scores = run.read(SCORES) if run.has(SCORES) else None
    table = results_table(results)
    users, summaries = user_stories(run, scores, results.split), summary_examples(run)
    people = f"{len(users)} users in full"
    charts = [
        chart for chart in (metrics_chart(results), *(score_charts(scores) if scores is not None else [])) if chart
    ]
    evidence_charts = [chart for chart in (*slice_charts(results), reliability_chart(results)) if chart]
    first_sections, evidence = (
        [each for each in sections(results) if each.detail is detail] for detail in (False, True)
    )
    contents = {
        people: users,
        "Results": table,
        **dict.fromkeys([section.title for section in first_sections], True),
        "Charts": charts,
        EVIDENCE: evidence_charts or evidence,
        **dict.fromkeys([section.title for section in evidence], True),
        "What the images became": summaries,
        "How it was made": facts,
    }
    cleaning = [(step.step, step.interactions, step.users, step.items, step.why) for step in facts.data.cleaning]
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"style": style, "duration": duration, "facts": shown_facts, "number": number}
    environment.filters |= {"public": public_text, "anchor": slug}
    page = environment.get_template("report.html.j2").render(
        page_title=f"MLLM-MSR on {results.dataset}",
        subtitle=", ".join([f"MLLM-MSR on {results.dataset}", *conditions(results)]),
        headline=headline(results),
        findings=findings(results),
        results=results,
        ours=OURS,
        variants=in_order(results.variants),
        table=table,
        sampled=results.n_candidates < facts.data.statistics.get("items", 0),
        folded=[section.title for section in evidence],
        contents=[title for title, part in contents.items() if part],
        people=people,
        users=users,
        ranked_by=variant_of(ranked_by(scores)).label if users and scores is not None else None,
        charts=charts,
        first_sections=first_sections,
        evidence_title=EVIDENCE,
        evidence=evidence,
        evidence_charts=evidence_charts,
        backbone=_backbone(facts),
        no_sft=variant_of("no_sft"),
        summaries=summaries,
        data=facts.data,
        cleaning=TableView.of_texts(
            ("step", "interactions", "users", "items", "why"), [[*map(number, row)] for row in cleaning]
        ),
        loss_chart=loss_chart(facts.model.training, facts.model.validation),
        seconds=facts.seconds,
        versions=facts.versions,
        recipe=yaml.safe_dump(public_recipe(run.recipe), sort_keys=False, allow_unicode=True),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
    )
    write_text(run.report, page)
    return run.report


def _backbone(facts: RunFacts) -> str | None:
    """The name of the pretrained model that was fine-tuned; None for the demo's own, which has read nothing."""
    if facts.own_backbone:
        return None
    return facts.backbone or "The model before training"


def duration(seconds: float) -> str:
    """
    >>> duration(3.21), duration(250), duration(7300)
    ('3.2 s', '4 min 10 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shown_facts(values: Mapping[str, Any], prefix: str = "") -> Sequence[tuple[str, str]]:
    """Nested facts as (name, text) pairs in reading order; what is None is left out."""
    pairs: list[tuple[str, str]] = []
    for key, value in values.items():
        name = prefix + key.replace("_", " ")
        if isinstance(value, Mapping):
            pairs += shown_facts(value, f"{name}, ")
        elif "timestamp" in key and isinstance(value, int):
            pairs.append((name.replace("timestamp", "interaction"), f"{datetime.fromtimestamp(value, UTC):%Y-%m-%d}"))
        elif value is not None:
            pairs.append((name, number(value)))
    return pairs


def number(value: object) -> str:
    """
    >>> number(12345), number(0.123456), number("as it is")
    ('12,345', '0.1235', 'as it is')
    """
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
