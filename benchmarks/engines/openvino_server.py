"""OpenVINO's continuous batching behind the few routes of OpenAI's that the benchmark needs.

Runs in the environment of OpenVINO: MODEL_DIR PORT THREADS. One thread steps the pipeline; streams
read their own generation's tokens.
"""

import asyncio
import itertools
import json
import sys
import threading
import time

import openvino_genai
from aiohttp import web


class Server:
    def __init__(self, folder: str, threads: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.cache_size = 3
        scheduler.max_num_batched_tokens = 1024
        scheduler.max_num_seqs = 16
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = True
        self.pipeline = openvino_genai.ContinuousBatchingPipeline(
            folder, scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        self.tokenizer = self.pipeline.get_tokenizer()
        self.ids = itertools.count()
        self.wake = threading.Condition()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            with self.wake:
                while not self.pipeline.has_non_finished_requests():
                    self.wake.wait()
            self.pipeline.step()

    async def chat(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompt = self.tokenizer.apply_chat_template(body["messages"], True)
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = body["max_tokens"]
        config.ignore_eos = True
        config.do_sample = False
        with self.wake:
            handle = self.pipeline.add_request(next(self.ids), prompt, config)
            self.wake.notify()
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
            text = self.tokenizer.decode(tokens) if tokens else ""
            if len(text) > len(told):
                choice = {"index": 0, "delta": {"content": text[len(told) :]}}
                await self.send(response, {"choices": [choice]})
                told = text
            if over and not handle.can_read():
                break
            await asyncio.sleep(0.002)
        usage = {"prompt_tokens": 0, "completion_tokens": len(tokens)}
        end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}], "usage": usage}
        await self.send(response, end)
        await response.write(b"data: [DONE]\n\n")
        return response

    async def send(self, response: web.StreamResponse, chunk: dict[str, object]) -> None:
        whole = {"id": "x", "object": "chat.completion.chunk", "created": int(time.time())}
        await response.write(b"data: " + json.dumps({**whole, "model": "m", **chunk}).encode())
        await response.write(b"\n\n")

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")


def main() -> None:
    folder, port, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    server = Server(folder, threads)
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/v1/chat/completions", server.chat)
    app.router.add_get("/health", server.health)
    web.run_app(app, host="127.0.0.1", port=port, print=None)


if __name__ == "__main__":
    main()
