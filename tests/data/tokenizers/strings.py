"""Varied strings for comparing tokenizers, the same ones for the same seed."""

# ruff: noqa: RUF001, characters that look like others are what this file is about.

import random
from collections.abc import Sequence

SEED = 20250611
COUNT = 2000

_WORDS = (
    "the", "quick", "brown", "fox", "it's", "they'll", "WE'VE", "I'm", "you'd", "Don'T", "naïve",
    "Zürich", "café", "tokenizer", "tokenization", "antidisestablishmentarianism", "HTTPServer",
    "snake_case_name", "camelCaseName", "__init__", "O'Neil's", "3rd", "42nd", "x86_64", "C++20",
    "v1.2.3-rc4", "foo@bar.example", "http://a.example/b?c=d&e=%20f#g", "/usr/local/bin",
    "C:\\Temp\\new.txt", "$HOME", "~/.ssh",
)  # fmt: skip
_CODE = (
    "def f(x: int) -> list[int]:\n    return [x ** 2 for x in range(x) if x % 3 == 0]\n",
    "\tfor (int i = 0; i < n; ++i) {\n\t\tsum += a[i] * b[i];\n\t}\n",
    'fn main() {\n    let v: Vec<u8> = b"\\x00\\xff".to_vec();\n    println!("{:?}", v);\n}\n',
    "const f = async ({a, ...rest}) => await g(`${a}: ${rest?.b ?? null}`);\n",
    "SELECT u.id, COUNT(*) FROM users u LEFT JOIN o ON o.uid = u.id WHERE u.n LIKE '%x_%';\n",
    '#!/usr/bin/env bash\nset -euo pipefail\nfor f in *.txt; do echo "$f" | sort -u; done\n',
    "<div class=\"a b\" id='c'>&nbsp;<!-- note --><br/></div>\n",
    '{"name": "read_file", "arguments": {"path": "src/a.py", "n": -1.5e-10}}\n',
    "@@ -1,7 +1,9 @@ int main(void)\r\n-  return 0;\r\n+  return 1;\r\n",
    "template <typename T> requires std::integral<T> auto operator<=>(T&& a) noexcept;\n",
    "module Main where\nimport Data.List (sortBy)\nmain = print $ foldr (\\x y -> x) 0 [1..10]\n",
    "| a | b |\n|---|:-:|\n| `c` | **d** |\n\n> quote\n\n1. one\n   - two\n",
    "class A(B):\n    '''Doc.'''\n\n    def __call__(self, *args, **kwargs): ...\n\n\n",
)
_LETTERS = (
    (0x41, 0x5A),
    (0x61, 0x7A),
    (0xC0, 0x17F),
    (0x370, 0x3FF),
    (0x400, 0x45F),
    (0x5D0, 0x5EA),
    (0x620, 0x64A),
    (0x904, 0x939),
    (0xE01, 0xE2E),
    (0x10A0, 0x10C5),
    (0x3041, 0x3096),
    (0x30A1, 0x30FA),
    (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3),
    (0x20000, 0x20400),
)
_CJK = ((0x4E00, 0x9FA5), (0x3041, 0x3096), (0x30A1, 0x30FA), (0xAC00, 0xD7A3))
_CJK_MARKS = "。，、！？「」：；（）《》…—～　"
_EMOJI = (
    "\U0001f600", "\U0001f680", "\U0001f1e9\U0001f1ea", "\U0001f44d\U0001f3fd", "\u2764\ufe0f",
    "\u2620\ufe0f", "1\ufe0f\u20e3", "\U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466",
    "\U0001f9d1\U0001f3fb\u200d\U0001f4bb", "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\U0001f44b\U0001f3ff", "\U0001fae0", "\U0001f9ff",
)  # fmt: skip
# Bases and marks that NFC composes, reorders, or leaves alone; and characters it replaces.
_COMBINING = (
    "e\u0301", "a\u0308", "o\u0302\u0323", "n\u0303", "q\u0307\u0323", "c\u0327\u0301",
    "\u1100\u1161\u11a8", "\u0915\u093c", "\u05d0\u05bc", "\u3046\u3099", "\u212b", "\u2126",
    "\uf900", "\u0344", "A\u030a", "i\u0307",
)  # fmt: skip
_SPACES = (
    " ", "  ", "   ", "\t", "\n", "\r\n", "\r", "\n\n", " \n", "\t\t", "\u00a0", "\u3000",
    "\u2028", "\x0b", "\u200b",
)  # fmt: skip
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~«»“”‘’–—…€£¥§°±×÷†‡•"
_DIGITS = "0123456789"
_OTHER_NUMBERS = "²³¹½¾Ⅳⅻ①⑳٠١٢३४५๙〇"
_LONE = (
    "", "\x00", "\x01\x02", "\x1b[31m", "\x7f", "\ufeff", "\ufffd", "\U0010ffff", "\u0301", "'",
    "'S", "\u017f", "'\u017f",
)  # fmt: skip


def strings(special: tuple[str, ...], *, seed: int = SEED, count: int = COUNT) -> list[str]:
    """`count` strings; some hold the model's special tokens, set off by plain characters."""
    rng = random.Random(seed)
    makers = (
        _sentence, _code, _cjk, _emoji, _digits, _spaces, _combining, _letters, _punctuation,
        _mixture, _repeats, lambda rng: _with_special(rng, special),
    )  # fmt: skip
    made = [*_LONE, *_EMOJI, *_COMBINING, *_SPACES, *special]
    return made + [rng.choice(makers)(rng) for _ in range(count - len(made))]


def _some(rng: random.Random, choices: Sequence[str], low: int, high: int) -> list[str]:
    return [rng.choice(choices) for _ in range(rng.randint(low, high))]


def _of_ranges(rng: random.Random, ranges: tuple[tuple[int, int], ...], low: int, high: int) -> str:
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(low, high)))


def _sentence(rng: random.Random) -> str:
    return rng.choice((" ", "", "  ")) + " ".join(_some(rng, _WORDS, 1, 14)) + rng.choice(".?! \n")


def _code(rng: random.Random) -> str:
    text = "".join(_some(rng, _CODE, 1, 2))
    indent = rng.choice(("", "    ", "\t", "  "))
    text = "".join(indent + line for line in text.splitlines(keepends=True))
    cut = rng.randint(0, len(text) - 1)
    return text[cut : cut + rng.randint(1, 160)]


def _cjk(rng: random.Random) -> str:
    pieces = [
        _of_ranges(rng, _CJK, 1, 8) + rng.choice(_CJK_MARKS) for _ in range(rng.randint(1, 4))
    ]
    return "".join(pieces)


def _emoji(rng: random.Random) -> str:
    return rng.choice(("", " ", "a")).join(_some(rng, _EMOJI, 1, 5))


def _digits(rng: random.Random) -> str:
    runs = [
        "".join(_some(rng, _DIGITS + _OTHER_NUMBERS * (rng.random() < 0.2), 1, 24))
        for _ in range(3)
    ]
    return rng.choice((" ", ",", ".", "-", "e", "x")).join(runs)


def _spaces(rng: random.Random) -> str:
    return "".join(
        rng.choice((_SPACES, _WORDS))[rng.randint(0, 14)] for _ in range(rng.randint(1, 12))
    )


def _combining(rng: random.Random) -> str:
    return rng.choice(("", " ", "x")).join(_some(rng, _COMBINING, 1, 8))


def _letters(rng: random.Random) -> str:
    return " ".join(_of_ranges(rng, _LETTERS, 1, 6) for _ in range(rng.randint(1, 4)))


def _punctuation(rng: random.Random) -> str:
    return rng.choice(("", " ", "a", "\n")).join(_some(rng, _PUNCTUATION, 1, 16))


def _repeats(rng: random.Random) -> str:
    return rng.choice("-= #ab*\t\n.0'") * rng.randint(2, 70)


def _mixture(rng: random.Random) -> str:
    makers = (_sentence, _code, _cjk, _emoji, _digits, _spaces, _combining, _letters, _punctuation)
    return "".join(rng.choice(makers)(rng)[:30] for _ in range(rng.randint(2, 4)))


def _with_special(rng: random.Random, special: tuple[str, ...]) -> str:
    # A plain character on both sides keeps NFC from composing a mark with a token's last letter.
    pieces = [rng.choice((_sentence, _code, _cjk))(rng)[:30] for _ in range(rng.randint(1, 3))]
    return "".join(
        f"{piece}{rng.choice((' ', 'a', chr(10)))}{rng.choice(special)}x" for piece in pieces
    )
