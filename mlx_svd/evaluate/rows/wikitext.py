"""WikiText's tokenized text as people write it, by the rules that lm-eval applies."""

import re

# In this order; each is applied to the result of the one before.
_RULES: tuple[tuple[str, str], ...] = (
    (r"s '", "s'"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    *((rf" {re.escape(mark)} ", f"{mark} ") for mark in ":;.!?,"),
    *(
        (rf"{a}\s*([^{b}]*?)\s*{b}", rf"{c}\1{d}")
        for a, b, c, d in (
            (r"\(", r"\)", "(", ")"),
            (r"\[", r"\]", "[", "]"),
            (r"{", r"}", "{", "}"),
            ('"', '"', '"', '"'),
            ("'", "'", "'", "'"),
        )
    ),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (r" ° ", "°"),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)


def detokenized(text: str) -> str:
    """Text without the spaces that WikiText puts around punctuation."""
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text


def count_words(text: str) -> int:
    """Words as lm-eval counts them, in the text before it is detokenized."""
    return len(re.split(r"\s+", text))
