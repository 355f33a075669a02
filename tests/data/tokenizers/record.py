"""Records what llama.cpp makes of the strings, for the tests to hold our tokenizers against.

Run from the root of the repository where `llama-cpp-python` is installed (0.3.36 made the files
here); it needs nothing else:

    python -m tests.data.tokenizers.record NAME MODEL.gguf

llama.cpp does not normalise text for byte-level BPE, so a model whose own tokenizer composes
characters first (NFC) is given composed text.
"""

import gzip
import json
import sys
import unicodedata
from pathlib import Path

from tests.data.tokenizers.strings import strings

HERE = Path(__file__).parent
SPECIAL = {
    "smollm2-135m": ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<file_sep>", "<jupyter_code>"),
    "qwen2.5-coder-0.5b": (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|fim_prefix|>",
        "<tool_call>",
        "</tool_call>",
    ),
    "gemma-3-270m": ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<unused7>"),
}
COMPOSED = ("qwen2.5-coder-0.5b",)


def main(name: str, path: str) -> None:
    """Write NAME.json.gz: ids with special tokens recognised, and where they differ, without."""
    from llama_cpp import Llama

    model = Llama(path, vocab_only=True, verbose=False)
    recognised, plain = [], {}
    for index, text in enumerate(strings(SPECIAL[name])):
        given = unicodedata.normalize("NFC", text) if name in COMPOSED else text
        ids = model.tokenize(given.encode(), add_bos=False, special=True)
        without = model.tokenize(given.encode(), add_bos=False, special=False)
        recognised.append(ids)
        if without != ids:
            plain[index] = without
    content = json.dumps({"recognised": recognised, "plain": plain}, separators=(",", ":"))
    (HERE / f"{name}.json.gz").write_bytes(gzip.compress(content.encode(), 9, mtime=0))


if __name__ == "__main__":
    main(*sys.argv[1:])
