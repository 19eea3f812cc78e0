"""The tables of a small shop, as its owner has them: semicolons, ISO dates, names of their own, some images missing."""

import random
from pathlib import Path

from PIL import Image

COLOURS = {"red": (200, 40, 40), "blue": (40, 60, 200), "green": (40, 150, 60), "yellow": (230, 200, 40)}
KINDS = ("Mug", "Lamp", "Bag", "Chair", "Plate")
MISSING = 9  # every so many items, one image is not there


def write_shop(folder: Path, users: int, items: int, seed: int = 5) -> Path:
    """Writes orders.csv, articles.csv and photos/ into a folder; who likes a colour buys it more often."""
    rng = random.Random(seed)
    (folder / "photos").mkdir(parents=True)
    looks, rows = [], ["article;name;description;photo"]
    for item in range(items):
        looks.append(rng.choice(list(COLOURS)))
        kind, name = KINDS[item % len(KINDS)], f"A{1000 + item}"
        rows.append(f'{name};No {item} {kind};"A {kind.lower()} for every day; sturdy";photos/{name}.png')
        if item % MISSING != 4:
            Image.new("RGB", (40 + item % 7, 40), COLOURS[looks[-1]]).save(folder / "photos" / f"{name}.png")
    (folder / "articles.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    orders = []
    for user in range(users):
        taste, chosen = rng.choice(list(COLOURS)), dict[int, None]()
        weights = [4.0 if look == taste else 1.0 for look in looks]
        length = rng.randint(5, min(12, items // 2))
        while len(chosen) < length:
            chosen[rng.choices(range(items), weights)[0]] = None
        for step, item in enumerate(chosen):
            orders.append(
                f"C{user:04d};A{1000 + item};2025-{1 + step:02d}-{1 + user % 28:02d}T10:00:00;{rng.randint(1, 5)}"
            )
    rng.shuffle(orders)
    (folder / "orders.csv").write_text(
        "\n".join(["customer;article;bought_at;stars", *orders]) + "\n", encoding="utf-8"
    )
    return folder
