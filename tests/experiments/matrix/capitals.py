"""A few facts, and settings of an experiment that measures them."""

COUNTRIES = {
    "France": "Paris", "Italy": "Rome", "Spain": "Madrid", "Norway": "Oslo", "Japan": "Tokyo",
    "Peru": "Lima", "Cuba": "Havana", "Egypt": "Cairo", "Kenya": "Nairobi", "Greece": "Athens",
    "Poland": "Warsaw", "Ireland": "Dublin",
}  # fmt: skip


def capitals() -> list[dict]:
    """Facts of the usual format."""
    names = list(COUNTRIES.values())
    return [
        {
            "relation": "capital",
            "subject": country,
            "object": city,
            "prompt": f"The capital of {country} is",
            "conflict": names[(i + 1) % len(names)],
            "distractors": [names[(i + 2) % len(names)], names[(i + 3) % len(names)]],
        }
        for i, (country, city) in enumerate(COUNTRIES.items())
    ]


SETTINGS = {
    "model": "tiny",
    "texts": {"heldout": {"file": "text.txt", "windows": 3, "length": 32}},
    "facts": {"file": "facts.json", "reserve": 0.25},
    "calibration": {"file": "text.txt", "windows": 3, "length": 32},
    "importance": {"prompts": 2},
}
