"""The pages in a real Chromium, opened as files: sorted, filtered, walked through by keyboard, in both themes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from specrag import Passage, SpeculativeAnswer
from specrag.evaluation.page import run_page
from specrag.evaluation.runs import Run
from specrag.schema import Draft, Timings, Verdict
from tests.page_parts import HOSTILE, make_run, race

playwright = pytest.importorskip("playwright.sync_api", reason="the pages are opened with playwright: make .venv/.dev")
expect = playwright.expect

SHOWN = HOSTILE.replace("\0", "\u2400").replace("\ud83d", "\ufffd")


@pytest.fixture
def show(chromium, tmp_path) -> Iterator:
    """Opens a page's text from a file. At the end nothing was logged, and nothing but the file was asked for."""
    contexts, wrong = [], []

    def open_page(text: str, *, size: tuple[int, int] = (1280, 900), scheme: str = "light", ready: bool = True):
        file = tmp_path / f"page-{len(contexts)}.html"
        file.write_text(text, encoding="utf-8")
        width, height = size
        contexts.append(chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
        page.on("request", lambda request: request.url.startswith(file.as_uri()) or wrong.append(request.url))
        page.goto(file.as_uri())
        if ready:
            page.wait_for_selector("html[data-ready=yes]")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run.load(make_run(tmp_path_factory.mktemp("run") / "run", [race(at) for at in range(12)]))


@pytest.fixture(scope="module")
def made(run) -> str:
    return run_page(run)


def numbers(page) -> list[int]:
    """The numbers of the examples in the table, from the top."""
    return [int(text) for text in page.locator("#examples tbody td.number").all_inner_texts()]


def focused(page) -> str:
    return page.evaluate("document.activeElement.innerText")


# --- a run ----------------------------------------------------------------------------------------------


def test_a_column_sorts_up_and_down(show, made):
    page = show(made)
    assert numbers(page) == list(range(1, 13))
    page.get_by_role("button", name="Sort by question").click()
    heading = page.locator("th", has=page.get_by_role("button", name="Sort by question"))
    expect(heading).to_have_attribute("aria-sort", "ascending")
    assert numbers(page) == list(range(1, 13))  # race 9 stands before race 10
    page.get_by_role("button", name="Sort by question").click()
    expect(heading).to_have_attribute("aria-sort", "descending")
    assert numbers(page) == list(range(12, 0, -1))
    page.get_by_role("button", name="Sort by outcome of standard").click()
    assert numbers(page)[-4:] == [1, 4, 7, 10]  # every third is wrong
    page.get_by_role("button", name="Sort by time of standard").press("Enter")
    assert numbers(page)[:3] == [1, 12, 2]  # 2, 2 and 3 seconds


def test_filters_narrow_the_table_and_are_taken_back(show, made):
    page = show(made)
    page.get_by_role("button", name="abstained wrongly").click()
    assert numbers(page) == [1, 6, 11]
    expect(page.locator("#count")).to_have_text("3 of 12 examples")
    page.get_by_role("button", name="verifier rescued a bad majority").click()
    assert numbers(page) == [1, 6, 11]
    page.get_by_role("button", name="chose wrongly although a right draft was there").click()
    assert numbers(page) == []
    page.get_by_role("button", name="Show all").click()
    page.get_by_role("button", name="chose wrongly although a right draft was there").press("Space")
    assert numbers(page) == [2, 8]
    page.locator("#system").select_option("standard")  # it has no drafts
    assert numbers(page) == []
    page.get_by_role("button", name="Show all").click()
    page.get_by_label("Search").fill("smith-7 won?")
    assert numbers(page) == []
    page.get_by_label("Search").fill("SMITH-7 race")
    assert numbers(page) == [8]


def test_an_example_is_opened_left_and_walked_by_keyboard(show, made):
    page = show(made)
    page.get_by_role("button", name="who won race 0?").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowUp")
    assert focused(page) == "who won race 1?"
    page.keyboard.press("End")
    page.keyboard.press("ArrowDown")
    assert focused(page) == "who won race 11?"
    page.keyboard.press("Home")
    page.keyboard.press("Enter")
    heading = page.get_by_role("dialog").get_by_role("heading", level=2)
    expect(heading).to_have_text("who won race 0?")
    page.keyboard.press("k")  # there is none before the first
    expect(heading).to_have_text("who won race 0?")
    page.keyboard.press("j")
    page.keyboard.press("j")
    expect(heading).to_have_text("who won race 2?")
    page.get_by_role("tab", name="standard").focus()
    page.keyboard.press("ArrowLeft")
    expect(page.get_by_role("tab", name="rapid")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("j")  # the next example shows the same system
    expect(page.get_by_role("tab", name="rapid")).to_have_attribute("aria-selected", "true")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    assert focused(page) == "who won race 3?"


def test_details_are_drawn_when_they_are_opened(show, made):
    page = show(made)
    assert page.locator("article").count() == 0
    page.get_by_role("button", name="who won race 2?").click()
    assert page.locator("article").count() == 10


def test_an_example_shows_drafts_scores_choice_and_passages_by_perspective(show, made):
    page = show(made)
    page.get_by_role("button", name="who won race 2?").click()
    page.get_by_role("tab", name="speculative").click()
    rows = page.get_by_role("table").filter(has_text="log ρ_draft").locator("tbody tr")
    assert rows.count() == 5
    first = rows.nth(0)
    for text in ("Ada Smith-2", "The passage says that it is Ada Smith-2", "chosen", "✓ right", "−1.25", "−2.50"):
        expect(first).to_contain_text(text)
    expect(rows.nth(1)).to_contain_text("✗ wrong")
    expect(rows.nth(4)).to_contain_text("the server closed the connection")
    assert page.locator("article:visible").count() == 10
    marks = page.locator("article mark.gold")
    assert marks.all_inner_texts() == ["Ada Smith-2"]
    expect(page.locator("article", has=page.locator("mark.gold"))).to_contain_text("marked as the right passage")
    page.get_by_role("button", name="Show passages 1, 4 of draft 1").click()
    assert page.locator("article:visible .index").all_inner_texts() == ["1", "4"]
    page.get_by_role("button", name="draft 5 9, 10", exact=True).click()
    assert page.locator("article:visible .index").all_inner_texts() == ["9", "10"]
    page.get_by_role("button", name="all", exact=True).click()
    assert page.locator("article:visible").count() == 10


def test_judgements_stand_in_a_table_with_passages_counted_from_one(show, made):
    page = show(made)
    page.get_by_role("button", name="who won race 2?").click()
    page.get_by_role("tab", name="corrective").click()
    rows = page.get_by_role("region", name="Judgements").locator("tr")
    assert [text.split("\t") for text in rows.all_inner_texts()] == [
        ["passage", "grade", "verdict", "strip"],
        ["1", "0.90", "correct", "–"],
        ["2", "0.65", "correct", "–"],
        ["3", "0.40", "correct", "–"],
        ["4", "0.15", "incorrect", "–"],
        ["1", "0.75", "–", "It was Ada Smith-2."],
    ]


def test_what_rapid_drafted_differs_by_more_than_colour(show, made):
    page = show(made)
    page.get_by_role("button", name="who won race 2?").click()
    page.get_by_role("tab", name="rapid").click()
    expect(page.locator("#panel")).to_contain_text("rejected: drafted, not kept (5)")
    looks = page.evaluate(
        """() => ["accepted", "rejected", "target"].map((kind) => {
            const style = getComputedStyle(document.querySelector(`.decoded .${kind}`));
            return style.textDecorationLine + " " + style.fontWeight;
        })"""
    )
    assert looks == ["underline 400", "line-through 400", "none 700"]
    kept = page.locator(".decoded .piece:not(.rejected)").all_text_contents()
    assert "".join(kept).startswith("The passages say that the answer is Ada Smith-2, as")
    expect(page.locator("#panel")).to_contain_text("0.713")


def test_the_theme_follows_the_system_and_the_button(show, made):
    def back(page) -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light, dark = back(show(made)), back(show(made, scheme="dark"))
    assert light != dark
    page = show(made)
    page.get_by_role("button", name="Dark").click()
    expect(page.get_by_role("button", name="Dark")).to_have_attribute("aria-pressed", "true")
    assert back(page) == dark
    page.get_by_role("button", name="Dark").click()
    assert back(page) == light


@pytest.mark.parametrize("opened", [False, True])
def test_a_phone_scrolls_down_only(show, run, opened):
    long = replace(run.questions[0], question="who won " + "averylongword" * 30, answers=("x" * 300,))
    page = show(run_page(replace(run, questions=(long, *run.questions[1:]))), size=(360, 740))
    if opened:
        page.locator("button.open").first.click()
        assert page.evaluate("document.getElementById('dialog').scrollWidth") <= 360
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_compressed_data_are_read(show, run):
    many = tuple(replace(q, passages=q.passages * 20) for q in run.questions)
    text = run_page(replace(run, questions=many))
    assert 'type="application/gzip"' in text
    page = show(text)
    page.get_by_role("button", name="who won race 11?").click()
    expect(page.locator("article").last).to_contain_text("Nobody from town 9 won anything that day.")


def test_hostile_texts_are_shown_as_texts(show, tmp_path):
    question = replace(race(0), question=HOSTILE, answers=(HOSTILE,), passages=(Passage(HOSTILE, title=HOSTILE),))
    page = show(run_page(Run.load(make_run(tmp_path / "run", [question]))))
    page.locator("button.open").click()
    assert page.locator("#example-heading").text_content() == SHOWN
    page.get_by_role("tab", name="speculative").click()
    assert page.locator("#panel .answer .said").text_content() == SHOWN
    assert page.locator("article .text").text_content() == SHOWN
    assert page.locator("img").count() == 0 and page.title() == "questions"


@pytest.mark.slow
def test_a_megabyte_of_text_is_shown(show, run):
    long = "Ada Smith-0 won. " * 60_000
    question = replace(run.questions[0], passages=(Passage(long),))
    page = show(run_page(replace(run, questions=(question,))))
    page.locator("button.open").click()
    assert page.locator("article .text").evaluate("element => element.textContent.length") == len(long)
    assert page.locator("article mark").count() == 500  # more would take the browser seconds


def test_data_that_were_cut_are_reported(show, made):
    page = show(made.replace('{"systems":', '{"systems"', 1), ready=False)
    expect(page.get_by_role("alert")).to_contain_text("The examples cannot be shown")


# --- one answer -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer() -> SpeculativeAnswer:
    passages = (Passage("Ada won.", title="Races"), Passage(HOSTILE, title="Other"))
    drafts = [
        Draft(0, (4, 1), passages, "Ada", "Races: Ada won.", log_answer=-0.5),
        Draft(1, (1,), passages[1:], "not in the passages", "", abstained=True),
    ]
    verdicts = (Verdict(drafts[0], log_draft=-0.5, log_score=-0.5), Verdict(drafts[1]))
    return SpeculativeAnswer(
        "who won?", "Ada", "Races: Ada won.", passages, False, verdicts, ("draft",), "embedder", Timings(draft=1.0)
    )


def test_the_page_of_one_answer_shows_it_at_once(show, answer):
    page = show(answer.to_html())
    expect(page.get_by_role("heading", level=1)).to_have_text("who won?")
    expect(page.get_by_role("region", name="Answer", exact=True)).to_contain_text("Ada")
    expect(page.locator("tr.chosen")).to_contain_text("−0.50")
    expect(page.locator("tr.abstained")).to_contain_text("not in the passages")
    assert page.locator("article .index").all_inner_texts() == ["2", "5"]
    assert page.locator("article .text").first.text_content() == SHOWN
    page.get_by_role("button", name="draft 2 2", exact=True).click()
    assert page.locator("article:visible .index").all_inner_texts() == ["2"]


def test_a_notebooks_styles_and_the_pages_leave_each_other_alone(show, answer):
    style = "<style>* { color: rgb(255, 0, 0) !important; font-size: 40px !important }</style>"
    page = show(f"<!DOCTYPE html>{style}<p id=mine>mine</p>{answer._repr_html_()}", ready=False)
    inside = page.frame_locator("iframe")
    expect(inside.get_by_role("heading", level=1)).to_have_text("who won?")
    inside.get_by_role("button", name="Dark").click()
    sizes = [
        place.evaluate("element => getComputedStyle(element).fontSize + getComputedStyle(element).color")
        for place in (page.locator("#mine"), inside.locator("#example .said").first)
    ]
    assert sizes[0] == "40pxrgb(255, 0, 0)" and sizes[1] not in sizes[:1]
    assert page.locator("iframe").evaluate("frame => frame.contentDocument") is None  # it cannot reach the notebook
