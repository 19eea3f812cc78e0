"""What the demo page shows, as HTML: histories with their preferences, and ranked items with the reasons.

It lies beside ``space_app.py`` in the Space. Texts come from models and catalogues, so all of them are escaped.
"""

import base64
import html
import io
from collections.abc import Sequence
from functools import cache
from typing import Any

from PIL import Image

SHOWN = 12  # ranked items, and as many more with every click
OPEN = 3  # of which the reasons are there at once
MEMBERS = {
    "answer": "the answer",
    "sequence_head": "sequence head",
    "neighbour_identity": "neighbours' identity",
    "identity_only": "identity alone",
    "content_only": "content alone",
    "likeness": "likeness of content",
    "gru4rec": "GRU4Rec",
    "sasrecf": "SASRecF",
    "gru4recf": "GRU4RecF",
    "bias": "how often it was chosen",
}
CSS = """
.things { display: flex; flex-wrap: wrap; gap: .6rem; margin: .4rem 0 }
.things figure { width: min(5.5rem, (100% - 1.2rem) / 3); margin: 0; font-size: .8rem; line-height: 1.2 }
.things img, .card img { width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: 6px; background: #fff }
.chapter { border-left: 4px solid var(--color-accent); padding: .1rem .8rem; margin: .6rem 0 }
.chapter.since { border-color: var(--border-color-primary) }
.quiet { opacity: .75; font-size: .85rem }
.cards { display: grid; gap: .8rem; padding: 0;
  grid-template-columns: repeat(auto-fill, minmax(max(270px, (100% - 1.6rem) / 3), 1fr)) }
.card { list-style: none; display: grid; grid-template-columns: 6rem 1fr; gap: .8rem; place-content: start stretch;
  border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .7rem;
  background: var(--background-fill-secondary); color: var(--body-text-color) }
.card.chosen { border: 2px solid var(--color-accent) }
.card p { margin: 0 0 .3rem }
.card details { grid-column: 1 / -1; font-size: .85rem }
.card summary { cursor: pointer }
.shares { display: grid; grid-template-columns: auto 1fr auto; gap: .15rem .5rem; align-items: center }
.bar { display: flex; height: .6rem;
  background: linear-gradient(var(--border-color-primary) 0 0) center / 1px no-repeat }
.bar i { background: var(--color-accent); border-radius: 2px }
.bar i.less { background: var(--body-text-color-subdued) }
#shelf .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.2rem, 1fr)) !important }
#shelf .thumbnail-item { display: block; width: 100%; height: auto; aspect-ratio: auto }
#shelf .thumbnail-item img { height: auto; aspect-ratio: 1; object-fit: contain }
#shelf .thumbnail-item.selected { border-color: var(--border-color-primary); box-shadow: none }
#shelf .caption-label { position: static; max-width: 100%; border: 0; white-space: normal; overflow: visible }
#who:not(:focus-within) [role=listbox] { display: none } /* else it stays open when Tab leaves it */
#who input:focus-visible, #find textarea:focus-visible { outline: 2px solid var(--body-text-color) !important }
@media (max-width: 640px) {
  .cards { grid-template-columns: 1fr }
  #ways .form { flex-direction: column }
}
"""


class View:
    """HTML of what a ``Demo`` has."""

    def __init__(self, demo: Any) -> None:
        self.demo = demo
        self.thumbnail = cache(lambda item: thumbnail(demo.item(item)["image"]))

    def figure(self, item: str, note: str = "") -> str:
        title = html.escape(self.demo.titles[item])
        return f'<figure><img src="{self.thumbnail(item)}" alt=""><figcaption>{title}{note}</figcaption></figure>'

    def story(self, history: Sequence[str], steps: Sequence[str]) -> str:
        """A history, oldest first, with the preference after each history block."""
        if not history:
            return f'<p class="quiet">No history: choose a user who has one, or click {self.demo.noun}s.</p>'
        blocks, recent = self.demo.split_history(history, self.demo.block_size)
        parts = []
        for number, block in enumerate(blocks):
            text = html.escape(steps[number]) if number < len(steps) else "<i>is being written …</i>"
            things, size = "".join(map(self.figure, block)), (number + 1) * self.demo.block_size
            parts.append(
                f'<div class="chapter"><div class="things">{things}</div>'
                f'<p class="step"><span class="quiet">The preference after {size}:</span> {text}</p></div>'
            )
        if recent:
            things = "".join(map(self.figure, recent))
            since = (
                "Since then, read as they are"
                if blocks
                else f"Read as they are, until {self.demo.block_size} are there"
            )
            parts.append(
                f'<div class="chapter since"><p class="quiet">{since}</p><div class="things">{things}</div></div>'
            )
        return "".join(parts)

    def card(self, place: int, found: Any, chosen: bool, widest: float) -> str:
        """A ranked item, and why it stands where it stands."""
        title, scores = html.escape(self.demo.titles[found.item_id]), [f"score {found.score:.2f}"]
        if found.logit is not None:
            scores.append(f"the answer's logit {found.logit:.2f}")
        elif found.shares:
            scores.append("the answer was not asked")
        why = ""
        if found.shares:
            near = "".join(self.figure(each.item_id, f" ({each.cosine:.2f})") for each in found.nearest)
            ordered = sorted(found.shares.items(), key=lambda share: -abs(share[1]))
            bars = "".join(bar(MEMBERS.get(name, name), share, widest) for name, share in ordered)
            why = (
                f"<details{' open' if place <= OPEN else ''}><summary>Why here?</summary>"
                f'<p class="quiet">Nearest in the history (cosine):</p><div class="things">{near}</div>'
                f'<p class="quiet">What each member adds to the score:</p><div class="shares">{bars}</div></details>'
            )
        return (
            f'<li class="card{" chosen" if chosen else ""}"><img src="{self.thumbnail(found.item_id)}" alt="">'
            f'<div><p class="title"><b>{"★ " if chosen else ""}{place}. {title}</b></p>'
            f'<p class="quiet">{"; ".join(scores)}</p></div>{why}</li>'
        )

    def ranking(
        self, user: str | None, history: list[str], steps: list[str], image: bool, text: bool, heads: bool, shown: int
    ) -> tuple[str, bool]:
        """The best of all items after a history with what is to be said of them; and whether there are more."""
        if not history:
            return '<p class="quiet">Nothing is ranked without a history.</p>', False
        found, said = self.demo.rank(history, steps, image, text, heads, shown)
        target, places = self.demo.chosen_next(user), {each.item_id: place for place, each in enumerate(found, 1)}
        if target in places:
            said.append(
                f"★ What this user really chose next, {self.demo.titles[target]}, is at place {places[target]}."
            )
        elif target and found:
            said.append(f"★ What this user really chose next, {self.demo.titles[target]}, is not ranked.")
        best = found[:shown]
        widest = max([1e-9, *(abs(share) for each in best for share in each.shares.values())])
        cards = "".join(self.card(place, each, each.item_id == target, widest) for place, each in enumerate(best, 1))
        shown_of = [f"Shown are the first {len(best)} of {len(found)}."] if len(best) < len(found) else []
        words = html.escape(" ".join([*said, *shown_of]))
        return f'<p class="said quiet">{words}</p><ol class="cards">{cards}</ol>', len(best) < len(found)


def thumbnail(image: Image.Image | None) -> str:
    """An image as a data URL; a grey one if there is none."""
    small = (image or Image.new("RGB", (96, 96), "#ddd")).convert("RGB")
    small.thumbnail((192, 192))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=85)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def bar(name: str, share: float, widest: float) -> str:
    """What a member adds, to the right of the middle, or takes away, to the left of it."""
    width = 50 * abs(share) / widest
    start, less = (50.0, "") if share >= 0 else (50 - width, ' class="less"')
    return (
        f"<span>{html.escape(name)}</span>"
        f'<span class="bar"><i{less} style="margin-left: {start:.1f}%; width: {width:.1f}%"></i></span>'
        f"<span>{round(share, 2) + 0.0:+.2f}</span>"
    )
