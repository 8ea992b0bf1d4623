"""The page of `specrag serve` in a real Chromium: it asks, and shows drafts and citations as texts."""

from __future__ import annotations

import re

import pytest

from specrag import SpeculativeRAG
from specrag.serving import ApiKeys, Models
from tests.fakes import HashEmbedder, ScriptedReader
from tests.rapid_parts import DOCUMENT
from tests.serving_parts import ALICE, RADIUM, index_of, rapid_models, real_models, served

playwright = pytest.importorskip("playwright.sync_api", reason="the page is opened with playwright: make .venv/.dev")
expect = playwright.expect


@pytest.fixture
def opened(chromium):
    """Opens a server's page. At the end, only that server was asked for anything, and no error was logged."""
    contexts, wrong = [], []

    def open_page(server, *, allowed: str = "$^"):
        contexts.append(chromium.new_context())
        page = contexts[-1].new_page()
        page.set_default_timeout(30_000)
        page.on("console", lambda told: re.search(allowed, told.text) or wrong.append(f"console: {told.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda asked: asked.url.startswith((server.url, "data:")) or wrong.append(asked.url))
        page.goto(server.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def ask(page, question: str) -> None:
    page.get_by_label("Question").fill(question)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#status")).to_have_text("done", timeout=60_000)


@pytest.mark.slow
def test_a_question_shows_its_answer_drafts_and_citations(opened):
    with served(real_models()) as server:
        page = opened(server)
        expect(page.locator("#model option")).to_have_count(3)
        ask(page, "when was radium discovered")
        expect(page.locator("#answer")).to_have_text("December 1898")
        expect(page.locator("#facts")).to_contain_text("confidence 0.")
        expect(page.locator("#drafts li.chosen b")).to_have_text("December 1898")
        expect(page.locator("#citations mark")).to_have_text("December 1898")
        page.get_by_label("Model").select_option("speculative-rag/tower")
        ask(page, "who designed the eiffel tower")
        expect(page.locator("#answer")).to_have_text("Maurice Koechlin")
        expect(page.locator("#citations")).not_to_contain_text("radium")


HOSTILE = '<img src=x onerror="document.title=1">\U0001f5fc <script>document.title=2</script> the answer'


@pytest.mark.slow
def test_markup_in_documents_stays_text_and_the_policy_lets_nothing_else_run(opened):
    embedder = HashEmbedder()
    rag = SpeculativeRAG(drafter=ScriptedReader({"the answer": 0.9}), embedder=embedder, drafts=2, calibration=None)
    with served(Models(rag=rag, indexes={"hostile": index_of((HOSTILE, RADIUM[0]), embedder)})) as server:
        page = opened(server, allowed="Content Security Policy|Content-Security-Policy")
        ask(page, "what is <b>this</b>?")
        expect(page.locator("#citations")).to_contain_text(HOSTILE)
        expect(page.locator("#citations mark")).to_have_text("the answer")
        assert page.title() == "specrag" and page.locator("#made img, #made script").count() == 0
        added = "const made = document.createElement('script'); made.text = 'document.title = 3'"
        page.evaluate(f"() => {{ {added}; document.body.append(made) }}")
        assert page.title() == "specrag"


@pytest.mark.slow
def test_with_keys_the_page_asks_for_one_and_uploads_a_file_for_rapid(opened, tiny, tmp_path):
    (tmp_path / "notes.txt").write_text(DOCUMENT)
    with served(rapid_models(tiny), keys=ApiKeys([ALICE]), max_tokens=8) as server:
        page = opened(server, allowed="401")
        expect(page.locator("#status")).to_contain_text("You didn't provide an API key")
        page.get_by_label("API key").fill(ALICE)
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#model option")).to_have_text(["rapid"])
        page.get_by_label("File").set_input_files(tmp_path / "notes.txt")
        ask(page, "who keeps the lamp")
        expect(page.locator("#facts")).to_contain_text("RAPID:")
        assert page.locator("#answer").inner_text()


def test_the_page_names_its_policy():
    with served(real_models()) as server, server.client() as http:
        response = http.get("/")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy and policy.count("sha256-") == 2
        assert response.headers["x-content-type-options"] == "nosniff"
        assert not re.search(r"https?://|innerHTML|eval\(", response.text)
