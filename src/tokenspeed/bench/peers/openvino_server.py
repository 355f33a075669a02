"""OpenVINO's continuous batching behind the few of OpenAI's routes that a replay needs.

A program, not a module of ours: it runs in OpenVINO's environment, with the arguments MODEL_DIR,
PORT and THREADS. One thread steps the pipeline; each stream reads its own generation's tokens.
"""

import asyncio
import itertools
import json
import sys
import threading
import time
from collections.abc import Mapping

import openvino_genai
from aiohttp import web

__all__ = ["PipelineServer", "main"]

_POLL_S = 0.002
_BODY_MAX_BYTES = 1 << 26


class PipelineServer:
    """A pipeline and the thread that steps it."""

    def __init__(self, folder: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 3
        scheduler.max_num_batched_tokens = 1024
        scheduler.max_num_seqs = 16
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self._tokenizer = self._pipeline.get_tokenizer()
        self._ids = itertools.count()
        self._wake = threading.Condition()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._wake:
                while not self._pipeline.has_non_finished_requests():
                    self._wake.wait()
            self._pipeline.step()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        """Stream an answer of exactly `max_tokens`."""
        body = await request.json()
        prompt = self._tokenizer.apply_chat_template(body["messages"], True)
        # The template has written what special tokens there are.
        ids = self._tokenizer.encode(prompt, add_special_tokens=False).input_ids
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = body["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        with self._wake:
            handle = self._pipeline.add_request(next(self._ids), ids, config)
            self._wake.notify()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        tokens: list[int] = []
        told = ""
        finished = openvino_genai.GenerationStatus.FINISHED
        while True:
            over = handle.get_status() == finished
            while handle.can_read():
                for output in handle.read().values():
                    tokens += output.generated_ids
            text = self._tokenizer.decode(tokens) if tokens else ""
            if len(text) > len(told):
                choice = {"index": 0, "delta": {"content": text[len(told) :]}}
                await _send(response, {"choices": [choice]})
                told = text
            if over and not handle.can_read():
                break
            await asyncio.sleep(_POLL_S)
        usage = {"prompt_tokens": int(ids.shape[1]), "completion_tokens": len(tokens)}
        end = {"index": 0, "delta": {}, "finish_reason": "length"}
        await _send(response, {"choices": [end], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


async def _send(response: web.StreamResponse, chunk: Mapping[str, object]) -> None:
    whole = {"id": "x", "object": "chat.completion.chunk", "created": int(time.time())}
    await response.write(b"data: " + json.dumps({**whole, "model": "m", **chunk}).encode())
    await response.write(b"\n\n")


async def _health(_request: web.Request) -> web.Response:
    return web.Response(text="ok")


async def _models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": "m", "object": "model"}]})


def main() -> None:
    """Serve until interrupted."""
    folder, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    server = PipelineServer(folder, threads)
    app = web.Application(client_max_size=_BODY_MAX_BYTES)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/v1/models", _models)
    app.router.add_get("/health", _health)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main()
