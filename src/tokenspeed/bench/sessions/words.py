"""Text of a wanted number of tokens, for any tokenizer trained on code."""

import random

__all__ = ["words"]

# With a space before it, each is one token of the vocabularies of GPT, Llama and Qwen.
_TEXT = (
    "def class return import self None True False for in if else while with open read write path "
    "list dict set index value token page cache step error test raise file line buffer "
    "parse format request response stream batch queue lock thread wait send model layer weight "
    "the of and to is that it as on this by from or an be are not at key name type size count "
    "data text code string number call run start stop end first last next update check result"
)
_WORDS = _TEXT.split()


def words(name: str, tokens: int, *, keep: int | None = None) -> str:
    """`tokens` words at random, the same ones for each name; of them only the first `keep`."""
    draw = random.Random(name)  # noqa: S311
    return " ".join(draw.choices(_WORDS, k=tokens)[:keep])
