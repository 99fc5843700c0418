"""Does a generated text give the answer?"""

import re


def matches(text: str, answer: str, scoring: str = "words") -> bool:
    """scoring "words": the answer stands in the text, letter case aside, and begins and ends at a
    word boundary. "seed": the rule of the seed documents, any substring ("au" in "because"), for
    comparison with their numbers only."""
    text, answer = text.lower(), answer.strip().lower()
    if scoring == "seed":
        return answer in text
    # Not \\b, which wants a letter or digit at the ends of the answer itself.
    return re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text) is not None
