"""A drawn catalogue and users whose tastes are known: the data of ``mllm-msr demo``.

Every item is an image (kind of thing, colour, pattern, badge) and a title that speaks of a topic only, so a model
has to look *and* read. Users like some values of each trait, their tastes drift while they browse, and a little
popularity is mixed in. Because the taste behind every choice is known, so is the best achievable AUC.
"""

import math
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageDraw

COLOURS = {
    "red": (214, 48, 49),
    "orange": (240, 140, 30),
    "yellow": (246, 214, 50),
    "green": (52, 160, 76),
    "blue": (40, 100, 220),
    "purple": (140, 70, 190),
    "pink": (245, 130, 185),
    "brown": (125, 80, 45),
}
KINDS = ("mug", "lamp", "vase", "bag", "kite", "clock")
PATTERNS = ("plain", "striped", "dotted", "checked")
BADGES = ("star", "heart", "ring", "cross")
TOPICS = {
    "jazz": ("jazz", "saxophone", "swing", "trumpet"),
    "ocean": ("ocean", "sailing", "harbour", "tide"),
    "space": ("space", "rocket", "comet", "orbit"),
    "forest": ("forest", "woodland", "pine", "fern"),
    "chess": ("chess", "gambit", "checkmate", "endgame"),
    "coffee": ("coffee", "espresso", "barista", "roast"),
    "robots": ("robots", "android", "circuit", "machine"),
    "history": ("history", "castle", "knight", "legend"),
    "winter": ("winter", "snow", "frost", "skating"),
    "garden": ("garden", "tulip", "orchard", "meadow"),
}
TRAITS = {
    "colour": tuple(COLOURS),
    "pattern": PATTERNS,
    "kind": KINDS,
    "badge": BADGES,
    "topic": tuple(TOPICS),
}
MAKERS = (
    *(
        "Alder",
        "Bexley",
        "Corvin",
        "Dunmore",
        "Elowen",
        "Farrow",
        "Gresham",
        "Hollis",
        "Ivers",
        "Jorvik",
        "Kestrel",
        "Lorne",
    ),
    *(
        "Marlow",
        "Norrell",
        "Orwin",
        "Penrose",
        "Quill",
        "Rowan",
        "Selwyn",
        "Thorne",
        "Upton",
        "Verity",
        "Wexford",
        "Yarrow",
    ),
)
SIZE = 96  # pixels; drawn at four times the size and reduced, so that edges are smooth
LIKED = {"colour": 2, "pattern": 1, "kind": 2, "badge": 1, "topic": 2}
WEIGHT = {"colour": 4.4, "pattern": 3.0, "kind": 3.2, "badge": 2.0, "topic": 4.6}
DRIFT = 0.05  # chance, before each choice, that one liked value is replaced
POPULARITY = 1.1  # standard deviation of an item's popularity, in the units of WEIGHT


@dataclass(frozen=True)
class DrawnItem:
    """One thing of the catalogue: its traits (trait -> value), the words about it, and the seed of its image."""

    item_id: str
    traits: dict[str, str]
    title: str
    text: str
    seed: int


@dataclass
class World:
    """A catalogue, every user's choices in order, and the utility each user gave each item at the last choice.

    ``histories[u]`` is a list of item indices, oldest first. ``utilities`` is ``(U, I)`` float: the true taste of user
    u at the moment of the last choice, popularity included; ranking by it is the oracle.
    """

    items: list[DrawnItem]
    histories: list[list[int]] = field(default_factory=list)
    utilities: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)))


def draw(item: DrawnItem) -> Image.Image:
    """The image of ``item``: an RGB image of SIZE x SIZE. The same item is always drawn alike."""
    rng = np.random.default_rng(item.seed)
    scale = 4
    edge = SIZE * scale
    grey = int(rng.integers(225, 250))
    canvas = Image.new("RGB", (edge, edge), (grey, grey, min(255, grey + int(rng.integers(0, 8)))))
    outline = Image.new("L", (edge, edge), 0)
    shape = ImageDraw.Draw(outline)
    size = edge * rng.uniform(0.74, 0.88)
    left, top = ((edge - size) * rng.uniform(0.3, 0.7) for _ in range(2))

    def at(*points: float) -> list[float]:
        return [(left, top)[i % 2] + value * size for i, value in enumerate(points)]

    _KIND_SHAPES[item.traits["kind"]](shape, at, size)
    canvas.paste(_surface(item.traits, edge, rng), mask=outline)
    _badge(ImageDraw.Draw(canvas), item.traits["badge"], at(0.42, 0.58), size * 0.17)
    return canvas.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def _surface(traits: dict[str, str], edge: int, rng: np.random.Generator) -> Image.Image:
    shade = rng.uniform(0.9, 1.05)
    red, green, blue = (min(255, round(channel * shade)) for channel in COLOURS[traits["colour"]])
    colour, second = (red, green, blue), (red // 3, green // 3, blue // 3)
    surface = Image.new("RGB", (edge, edge), colour)
    pen = ImageDraw.Draw(surface)
    step = edge // 8
    shift = int(rng.integers(0, step))
    match traits["pattern"]:
        case "striped":
            for y in range(-step + shift, edge, step):
                pen.rectangle((0, y, edge, y + step * 0.4), fill=second)
        case "dotted":
            for y in range(-step + shift, edge, step):
                for x in range(-step + shift, edge, step):
                    pen.ellipse((x, y, x + step * 0.5, y + step * 0.5), fill=second)
        case "checked":
            for row, y in enumerate(range(-step + shift, edge, step)):
                for x in range(-step + shift + (row % 2) * step, edge, 2 * step):
                    pen.rectangle((x, y, x + step, y + step), fill=second)
    return surface


def _mug(pen: ImageDraw.ImageDraw, at, size: float) -> None:
    pen.ellipse(at(0.55, 0.3, 0.98, 0.8), outline=255, width=round(size * 0.09))
    pen.rounded_rectangle(at(0.08, 0.15, 0.76, 0.95), radius=size * 0.08, fill=255)


def _lamp(pen: ImageDraw.ImageDraw, at, size: float) -> None:
    pen.polygon(at(0.25, 0.0, 0.6, 0.0, 0.92, 0.74, -0.07, 0.74), fill=255)
    pen.rectangle(at(0.38, 0.7, 0.46, 0.95), fill=255)
    pen.rectangle(at(0.18, 0.92, 0.66, 1.0), fill=255)


def _vase(pen: ImageDraw.ImageDraw, at, size: float) -> None:
    pen.ellipse(at(0.05, 0.28, 0.8, 0.98), fill=255)
    pen.rectangle(at(0.3, 0.05, 0.55, 0.4), fill=255)
    pen.rectangle(at(0.2, 0.0, 0.65, 0.08), fill=255)


def _bag(pen: ImageDraw.ImageDraw, at, size: float) -> None:
    pen.arc(at(0.22, 0.0, 0.62, 0.6), 180, 360, fill=255, width=round(size * 0.06))
    pen.polygon(at(0.08, 0.3, 0.76, 0.3, 0.92, 1.0, -0.08, 1.0), fill=255)


def _kite(pen: ImageDraw.ImageDraw, at, size: float) -> None:
    pen.polygon(at(0.42, 0.0, 0.88, 0.52, 0.42, 1.0, -0.04, 0.52), fill=255)


def _clock(pen: ImageDraw.ImageDraw, at, size: float) -> None:
    pen.ellipse(at(-0.02, 0.14, 0.86, 1.0), fill=255)
    pen.ellipse(at(-0.02, 0.02, 0.26, 0.28), fill=255)
    pen.ellipse(at(0.58, 0.02, 0.86, 0.28), fill=255)


_KIND_SHAPES = {"mug": _mug, "lamp": _lamp, "vase": _vase, "bag": _bag, "kite": _kite, "clock": _clock}


def _badge(pen: ImageDraw.ImageDraw, badge: str, centre: list[float], radius: float) -> None:
    x, y = centre
    r = radius
    white, ink = (255, 255, 255), (20, 20, 20)
    pen.ellipse((x - r * 1.25, y - r * 1.25, x + r * 1.25, y + r * 1.25), fill=white)
    match badge:
        case "star":
            corners = [(r if k % 2 == 0 else r * 0.42, math.pi * k / 5 - math.pi / 2) for k in range(10)]
            pen.polygon([(x + a * math.cos(t), y + a * math.sin(t)) for a, t in corners], fill=ink)
        case "heart":
            pen.ellipse((x - r * 0.85, y - r * 0.75, x + r * 0.05, y + r * 0.15), fill=ink)
            pen.ellipse((x - r * 0.05, y - r * 0.75, x + r * 0.85, y + r * 0.15), fill=ink)
            pen.polygon((x - r * 0.8, y, x + r * 0.8, y, x, y + r * 0.9), fill=ink)
        case "ring":
            pen.ellipse((x - r * 0.8, y - r * 0.8, x + r * 0.8, y + r * 0.8), outline=ink, width=max(1, round(r * 0.4)))
        case "cross":
            pen.rectangle((x - r * 0.22, y - r * 0.85, x + r * 0.22, y + r * 0.85), fill=ink)
            pen.rectangle((x - r * 0.85, y - r * 0.22, x + r * 0.85, y + r * 0.22), fill=ink)


def random_item(rng: np.random.Generator, item_id: str) -> DrawnItem:
    """An item with uniformly drawn traits; its title and text are independent of everything visible."""
    traits = {trait: str(rng.choice(values)) for trait, values in TRAITS.items()}
    first, second = rng.choice(TOPICS[traits["topic"]], 2, replace=False)
    title = f"{rng.choice(MAKERS)} {first.capitalize()}"
    return DrawnItem(item_id, traits, title, f"Made for {second} lovers", int(rng.integers(2**31)))


def make_world(seed: int, n_users: int = 400, n_items: int = 360, min_length: int = 11, max_length: int = 20) -> World:
    """Draw a catalogue and let every user choose, without repetition, by softmax of taste plus popularity."""
    if n_items <= max_length:
        raise ValueError(f"{n_items} items are too few for histories of up to {max_length} without repetition")
    rng = np.random.default_rng(seed)
    items = [random_item(rng, f"i{index:04d}") for index in range(n_items)]
    popularity = rng.normal(0.0, POPULARITY, n_items)
    codes = {trait: np.array([TRAITS[trait].index(item.traits[trait]) for item in items]) for trait in TRAITS}
    histories, utilities = [], np.zeros((n_users, n_items))
    for user in range(n_users):
        taste = {trait: rng.choice(len(TRAITS[trait]), LIKED[trait], replace=False) for trait in TRAITS}
        chosen: list[int] = []
        for _ in range(int(rng.integers(min_length, max_length + 1))):
            if rng.random() < DRIFT:
                trait = str(rng.choice(list(TRAITS)))
                others = np.setdiff1d(np.arange(len(TRAITS[trait])), taste[trait])
                taste[trait][rng.integers(len(taste[trait]))] = rng.choice(others)
            utility = popularity + sum(WEIGHT[trait] * np.isin(codes[trait], taste[trait]) for trait in TRAITS)
            odds = np.exp(utility - utility.max())
            odds[chosen] = 0.0
            chosen.append(int(rng.choice(n_items, p=odds / odds.sum())))
        histories.append(chosen)
        utilities[user] = utility
    return World(items, histories, utilities)


def condense(block: list[dict[str, str]], previous: dict[str, list[str]] | None) -> dict[str, list[str]]:
    """The preference a careful reader would keep: per trait up to two values, those seen before fading.

    A value scores 1 for each item of the block that has it, plus 2 or 1.2 if it led or followed in the previous
    preference; of equals the more recent wins.
    """
    kept: dict[str, list[str]] = {}
    for trait in TRAITS:
        score: dict[str, float] = {}
        for value, memory in zip((previous or {}).get(trait, []), (2.0, 1.2), strict=False):
            score[value] = memory
        for position, traits in enumerate(block):
            value = traits[trait]
            score[value] = score.get(value, 0.0) + 1.0 + 0.01 * position
        kept[trait] = sorted(score, key=lambda value: -score[value])[:2]
    return kept


def describe(traits: dict[str, str]) -> str:
    """The summary of an item, as the base model is taught to write it."""
    return f"{traits['colour']} {traits['pattern']} {traits['kind']} with {traits['badge']} about {traits['topic']}"


def preference_text(kept: dict[str, list[str]]) -> str:
    """A preference in words, as the base model is taught to write it."""
    return "Likes " + "; ".join(", ".join(kept[trait]) for trait in TRAITS)
