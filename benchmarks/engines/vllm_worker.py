"""One stream on vLLM, stepped in this process: MODEL_DIR CONTEXT."""

import itertools
import os
import sys
import time
from collections.abc import Sequence

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

from protocol import serve
from vllm import LLM, SamplingParams


def main() -> None:
    llm = LLM(
        sys.argv[1],
        dtype="bfloat16",
        max_model_len=int(sys.argv[2]),
        max_num_seqs=1,
        enable_prefix_caching=False,
        max_num_batched_tokens=2048,
    )
    engine = llm.llm_engine
    requests = itertools.count()

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[float, float, Sequence[int]]:
        params = SamplingParams(
            temperature=0.0, max_tokens=new_tokens, min_tokens=new_tokens, ignore_eos=True
        )
        tokens: Sequence[int] = []
        start_s = time.perf_counter()
        engine.add_request(str(next(requests)), {"prompt_token_ids": list(prompt)}, params)
        first_s = last_s = start_s
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens = output.outputs[0].token_ids
                last_s = time.perf_counter()
                first_s = last_s if len(tokens) == 1 else first_s
        return first_s - start_s, last_s - first_s, tokens

    serve(answer)


if __name__ == "__main__":
    main()
