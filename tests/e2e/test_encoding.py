"""The gateway's cache of encodings changes no token."""

import asyncio
import random

import pytest

from tests.support.recording_gateway import recording_gateway
from tokenspeed.loader import ModelFiles, Tokenizer

# What may be cut or joined where a cached beginning ends: marks written out and half of them, white
# space of all kinds, characters that a normaliser joins with the one before.
PIECES = (
    *("<|im_end|>", "<|im_start|>", "<|im_end|", "|>", "<", "<tool_call>", "</s>"),
    *(" ", "  ", "\n", "\n\n", "\t", "\r\n", "\u00a0", "\u2581"),
    *("e\u0301", "\u0301", "\u0327", "e", "\U0001f427", "\u200d", "\U0001f1eb", "\U0001f1f7", "中"),
    *("word", " word", "Word's", "123456", "def f(x):\n    return x", "==", "''"),
)
TURNS = 40


@pytest.mark.parametrize("model", ["smollm2", "qwen_coder"])
def test_each_turn_is_encoded_as_the_whole_text_would_be(
    model: str, request: pytest.FixtureRequest
) -> None:
    files: ModelFiles = request.getfixturevalue(model)
    tokenizer = Tokenizer(files.tokenizer_dir)

    async def run() -> None:
        async with recording_gateway(files.tokenizer_dir, encoding_cache=True) as gateway:
            for seed in range(3):
                print(f"seed {seed}")
                draw = random.Random(seed)
                messages: list[dict[str, str]] = []
                for turn in range(TURNS):
                    role = ("user", "assistant")[turn % 2]
                    text = "".join(draw.choices(PIECES, k=draw.randrange(1, 30)))
                    messages.append({"role": role, "content": text})
                    if turn % 2 == 0:
                        rendered = tokenizer.render_chat(messages)
                        assert await gateway.encode(messages) == tokenizer.encode(rendered)

    asyncio.run(run())
