"""Runs in the environment of OpenVINO: a GGUF file as a Hugging Face directory in bfloat16.

    python export_hf.py MODEL.gguf TOKENIZER_DIR TARGET
"""

import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, GgufConfig


def main() -> None:
    source, tokenizer, target = map(Path, sys.argv[1:])
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    model.save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, target / name)


if __name__ == "__main__":
    main()
