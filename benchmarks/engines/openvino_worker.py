"""One stream on OpenVINO GenAI: MODEL_DIR THREADS."""

import sys
from collections.abc import Sequence

import numpy as np
import openvino as ov
import openvino_genai
from protocol import serve


def main() -> None:
    pipeline = openvino_genai.LLMPipeline(
        sys.argv[1], "CPU", INFERENCE_NUM_THREADS=int(sys.argv[2])
    )

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[float, float, Sequence[int]]:
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = new_tokens
        config.ignore_eos = True
        config.do_sample = False
        config.apply_chat_template = False
        result = pipeline.generate(ov.Tensor(np.array([prompt], dtype=np.int64)), config)
        metrics = result.perf_metrics
        first_s = metrics.get_ttft().mean / 1e3
        rest_s = metrics.get_tpot().mean / 1e3 * (new_tokens - 1) if new_tokens > 1 else 0.0
        return first_s, rest_s, result.tokens[0]

    serve(answer)


if __name__ == "__main__":
    main()
