"""One stream on TokenSpeed, stepped in this process: MODEL THREADS CONTEXT KV_DTYPE."""

import importlib
import itertools
import sys
import time
from collections.abc import Sequence

import numpy as np
from protocol import serve

from tokenspeed import SamplingParams
from tokenspeed.core.config import EngineConfig
from tokenspeed.core.environment import let_threads_sleep
from tokenspeed.engine.wire import Submit


def main() -> None:
    let_threads_sleep()
    # Only now, because it imports torch.
    build_engine = importlib.import_module("tokenspeed.engine.build").build_engine

    model, kv_dtype = sys.argv[1], sys.argv[4]
    threads, context = int(sys.argv[2]), int(sys.argv[3])
    core = build_engine(
        EngineConfig(
            model=model,
            threads=threads,
            max_context=context,
            kv_dtype=kv_dtype,
            prefix_cache=False,
            max_running=1,
            # Each engine computes every token.
            speculate="off",
        )
    ).core
    params = SamplingParams(temperature=0.0, ignore_eos=True)
    requests = itertools.count()

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[float, float, Sequence[int]]:
        ids = np.array(prompt, dtype=np.int32).tobytes()
        tokens: list[int] = []
        start_s = time.perf_counter()
        core.submit(Submit(next(requests), ids, params, new_tokens, 0, 0, 0, None))
        first_s = last_s = start_s
        while core.busy:
            outputs = core.step()
            now_s = time.perf_counter()
            if outputs is not None and outputs.tokens:
                tokens += np.frombuffer(outputs.tokens, dtype=np.int32).tolist()
                first_s = now_s if len(tokens) == 1 else first_s
                last_s = now_s
        return first_s - start_s, last_s - first_s, tokens

    serve(answer)


if __name__ == "__main__":
    main()
