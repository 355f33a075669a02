"""A task of more than ten turns, run by an agents' library of others against a real model."""

import asyncio
from pathlib import Path
from typing import Any, Literal

import openai
import pytest

from tokenspeed.loader import ModelFiles

from .serving import Serve

agents: Any = pytest.importorskip(
    "agents", reason="openai-agents is not installed: pip install 'tokenspeed[agents]'"
)

MODEL = "qwen2.5-coder-0.5b"
BUG = "def add(a, b):\n    return a - b\n"
MENDED = BUG.replace("-", "+")
STEPS = (
    *("list", "read", "read", "test", "edit", "read", "test"),
    *("list", "note", "note", "read", "finish"),
)


class Task:
    """A folder with a mistake, tools to mend it, and which of them is on offer next.

    A model of half a billion parameters does not find its way, and calls a tool that is required
    again and again until its length is reached; so it has to call the one of its turn, by name.
    What it puts into the arguments is its own.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "calc.py"
        self.file.write_text(BUG)
        self.done: list[str] = []
        self.settings = agents.ModelSettings(
            tool_choice=STEPS[0], temperature=0.0, max_tokens=100, parallel_tool_calls=False
        )

    def on_offer(self, name: str) -> bool:
        return len(self.done) < len(STEPS) and STEPS[len(self.done)] == name

    def tools(self) -> list[Any]:
        """One for each name, enabled in its turn."""

        def listed() -> str:
            """Lists the folder."""
            return self._did("list", " ".join(p.name for p in self.file.parent.iterdir()))

        def read(path: Literal["calc.py"]) -> str:
            """Reads a file."""
            return self._did("read", f"{path}: {self.file.read_text()}")

        def test() -> str:
            """Runs the tests."""
            scope: dict[str, Any] = {}
            exec(self.file.read_text(), scope)
            return self._did("test", "passed" if scope["add"](2, 3) == 5 else "failed")

        def edit(operator: Literal["+", "-"]) -> str:
            """Puts a plus where the minus is."""
            self.file.write_text(MENDED)
            return self._did("edit", f"edited {operator}")

        def note(text: Literal["seen", "mended"]) -> str:
            """Keeps a note."""
            return self._did("note", f"noted: {text}")

        def finish(summary: Literal["mended", "given up"]) -> str:
            """Ends the task."""
            return self._did("finish", summary)

        named = {
            "list": listed,
            "read": read,
            "test": test,
            "edit": edit,
            "note": note,
            "finish": finish,
        }
        return [
            agents.function_tool(
                function,
                name_override=name,
                is_enabled=lambda _context, _agent, name=name: self.on_offer(name),
            )
            for name, function in named.items()
        ]

    def _did(self, name: str, result: str) -> str:
        assert self.on_offer(name)
        self.done.append(name)
        if len(self.done) < len(STEPS):
            self.settings.tool_choice = STEPS[len(self.done)]
        return result


@pytest.mark.slow
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_task_of_twelve_turns_is_completed(
    qwen_coder: ModelFiles, tmp_path: Path, api: str
) -> None:
    task = Task(tmp_path)

    async def run(url: str) -> Any:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
            kind = (
                agents.OpenAIChatCompletionsModel if api == "chat" else agents.OpenAIResponsesModel
            )
            agent = agents.Agent(
                name="mender",
                instructions="You mend a small Python file. Call the tool you are given.",
                model=kind(model=MODEL, openai_client=client),
                model_settings=task.settings,
                tools=task.tools(),
                reset_tool_choice=False,
                tool_use_behavior=agents.StopAtTools(stop_at_tool_names=["finish"]),
            )
            return await agents.Runner.run(agent, "The tests fail. Mend calc.py.", max_turns=40)

    agents.set_tracing_disabled(True)
    flags = ("--max-context", "8192", "--kv-cache-memory", "128MiB")
    with Serve(tmp_path.parent / f"{api}.log", *flags, model=MODEL) as server:
        result = asyncio.run(run(server.url))
    assert task.done == list(STEPS)
    assert task.file.read_text() == MENDED
    assert len(result.raw_responses) == len(STEPS) >= 10
    # Tools stand at the head of a prompt and change with each turn, so little else is cached.
    assert sum(r.usage.input_tokens_details.cached_tokens for r in result.raw_responses) > 0
