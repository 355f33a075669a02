"""The dashboard in a real browser, on a real server with a real model."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2 as pb
from smg_grpc_proto.generated import tokenspeed_scheduler_pb2_grpc as pb_grpc

from tests.support.browser import chromium
from tokenspeed.loader import ModelFiles

from .serving import Serve, wait_for
from .test_operations import ask

HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
# A folder for pictures of the page, for `docs/operations.md`.
PICTURES = os.environ.get("TOKENSPEED_TEST_PICTURES")


@pytest.fixture(scope="module")
def page(smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory) -> Iterator["Page"]:
    log = tmp_path_factory.mktemp("dashboard") / "log"
    with chromium() as driver, Serve(log, "--no-curl") as server:
        url = server.operations_url()
        driver.get(url)
        yield Page(driver, server, url)


class Page:
    """The dashboard, open in a browser."""

    def __init__(self, driver: Any, server: Serve, url: str) -> None:
        self.driver = driver
        self.server = server
        self.url = url

    def text(self, selector: str) -> str:
        return str(
            self.driver.execute_script(
                "return document.querySelector(arguments[0])?.innerText ?? ''", selector
            )
        )

    def count(self, selector: str) -> int:
        found = self.driver.execute_script(
            "return document.querySelectorAll(arguments[0]).length", selector
        )
        return int(found)

    def until(self, selector: str, words: str) -> str:
        return wait_for(lambda: self.text(selector), lambda text: words in text)

    def click(self, selector: str) -> None:
        self.driver.find_element("css selector", selector).click()

    def complaints(self) -> list[str]:
        """What the browser's console holds of errors and broken policies."""
        return [
            entry["message"]
            for entry in self.driver.get_log("browser")
            if entry["level"] in ("SEVERE", "WARNING")
        ]

    def picture(self, name: str) -> None:
        if PICTURES is not None:
            self.driver.save_screenshot(str(Path(PICTURES) / f"{name}.png"))


def test_the_page_shows_the_engine_and_breaks_no_policy(page: Page) -> None:
    page.until("#model", "smollm2-135m")
    page.until("#health", "healthy")
    page.until("#tiles", "floor, tokens/s")
    wait_for(lambda: page.count("#map i"), lambda count: 300 < count < 420)
    assert page.complaints() == []


def test_sessions_and_a_request_s_timeline(page: Page) -> None:
    for turn in range(3):
        answer = ask(page.server, f"Tell story {turn}.", request_id=f"tenant=ann/{turn}")
        assert answer.status_code == 200
    page.until("#sessions", "ann")
    wait_for(lambda: page.count("#sessions .rate"), lambda count: count >= 1)
    page.until("#requests", "tenant=ann/2")
    page.click("#requests tr.pick")
    page.until("#phases", "decode")
    page.until("#phases", "prefill")
    assert page.count("#bars .bar i") >= 2
    assert "not known" in page.text("#phases")
    page.picture("dashboard")
    assert page.complaints() == []


def test_the_chat_box_streams_an_answer(page: Page) -> None:
    box = page.driver.find_element("css selector", "#words")
    box.send_keys("Name three fruits.")
    page.click("#send")
    wait_for(lambda: len(page.text("#talk p.assistant")), lambda length: length > 3)
    wait_for(
        lambda: page.driver.execute_script("return document.getElementById('send').disabled"),
        lambda disabled: not disabled,
    )
    page.until("#sessions", "dashboard")
    page.until("#requests", "tenant=dashboard")
    page.click("#requests tr.pick")
    page.until("#phases", "gateway")
    page.driver.execute_script("document.getElementById('detail').scrollIntoView(false)")
    page.picture("dashboard-chat")
    assert page.complaints() == []


def test_text_of_requests_stays_text(page: Page) -> None:
    # The gateway lets no such id through; what reaches the servicer must be harmless all the same.
    with page.server.servicer() as channel:
        stub = pb_grpc.TokenSpeedSchedulerStub(channel)
        for name in (HOSTILE, f"tenant={HOSTILE.replace('/', '')}"):
            call = stub.Generate(
                pb.GenerateRequest(
                    request_id=f"{name}-01234567-89ab-cdef-0123-456789abcdef",
                    tokenized=pb.TokenizedInput(input_ids=[1, 5, 6]),
                    sampling_params=pb.SamplingParams(max_new_tokens=4),
                )
            )
            assert [*call][-1].HasField("complete")
    page.until("#requests", "onerror")
    page.until("#sessions", "onerror")
    assert page.count("table img, table script") == 0
    assert "owned" not in page.driver.title
    box = page.driver.find_element("css selector", "#words")
    box.send_keys(HOSTILE)
    page.click("#send")
    page.until("#talk", "onerror")
    assert page.count("#talk img, #talk script") == 0
    # And if a way in were found, the browser would not run it.
    for markup in (
        "document.getElementById('talk').innerHTML = '<b>x</b>'",
        "document.body.append(Object.assign(document.createElement('script'), {text: '1'}))",
    ):
        with pytest.raises(Exception, match="Trusted"):
            page.driver.execute_script(markup)
    assert "owned" not in page.driver.title
    page.complaints()


def test_the_button_drains_and_resumes(page: Page) -> None:
    page.click("#drain")
    page.until("#health", "draining")
    assert ask(page.server, "Hi", request_id="late").status_code == 429
    page.until("#drain", "Resume")
    page.click("#drain")
    page.until("#health", "healthy")
    assert ask(page.server, "Hi", request_id="later").status_code == 200
    assert page.complaints() == []


def test_the_page_is_served_with_its_policy(page: Page) -> None:
    answer = httpx.get(page.url, trust_env=False)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert answer.headers["x-content-type-options"] == "nosniff"
    # Nothing is fetched from elsewhere.
    assert "//" not in answer.text.replace("// ", "").replace("http://www.w3.org", "")


def test_with_a_key_the_page_asks_for_it(
    smollm2: ModelFiles, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = tmp_path_factory.mktemp("keyed") / "log"
    with chromium() as driver, Serve(log, "--no-curl", "--api-key", "k3y") as server:
        page = Page(driver, server, server.operations_url())
        driver.get(page.url)
        page.until("#health", "an API key is needed")
        assert page.text("#model") == "TokenSpeed"
        driver.find_element("css selector", "#key").send_keys("k3y")
        page.click("#keys button")
        page.until("#model", "smollm2-135m")
        driver.find_element("css selector", "#words").send_keys("Hello")
        page.click("#send")
        wait_for(lambda: len(page.text("#talk p.assistant")), lambda length: length > 1)
