"""One stream on llama.cpp, through its C interface: MODEL.gguf THREADS CONTEXT [--no-repack]."""

import ctypes
import sys
import time
from collections.abc import Sequence

import llama_cpp
import numpy as np
from protocol import serve


def main() -> None:
    path, threads, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    llama_cpp.llama_backend_init()
    model_params = llama_cpp.llama_model_default_params()
    model_params.use_extra_bufts = "--no-repack" not in sys.argv
    model = llama_cpp.llama_model_load_from_file(path.encode(), model_params)
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = context
    params.n_batch = params.n_ubatch = 512
    params.n_threads = params.n_threads_batch = threads
    params.flash_attn_type = 1
    handle = llama_cpp.llama_init_from_model(model, params)
    assert handle, "llama.cpp made no context"
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def decode(ids: Sequence[int]) -> None:
        array = (llama_cpp.llama_token * len(ids))(*ids)
        assert llama_cpp.llama_decode(handle, llama_cpp.llama_batch_get_one(array, len(ids))) == 0

    def likeliest() -> int:
        logits = llama_cpp.llama_get_logits_ith(handle, -1)
        floats = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        return int(np.ctypeslib.as_array(floats, shape=(vocabulary,)).argmax())

    def answer(prompt: Sequence[int], new_tokens: int) -> tuple[float, float, Sequence[int]]:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(handle), True)
        start_s = time.perf_counter()
        for at in range(0, len(prompt), 512):
            decode(prompt[at : at + 512])
        tokens = [likeliest()]
        first_s = time.perf_counter()
        for _ in range(new_tokens - 1):
            decode(tokens[-1:])
            tokens.append(likeliest())
        return first_s - start_s, time.perf_counter() - first_s, tokens

    serve(answer)


if __name__ == "__main__":
    main()
