"""The page of a run and of one answer, as files: whole, small, and without harm whatever the texts say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from specrag import Passage, SpeculativeRAG
from specrag._page.document import PACKED_FROM
from specrag.cli import app
from specrag.errors import InvalidInputError, NotFoundError
from specrag.evaluation.data import load_questions
from specrag.evaluation.page import run_page, write_page
from specrag.evaluation.runs import Run
from tests.page_parts import HOSTILE, SYSTEMS, answered, draft, make_run, race, rows_of

NQ = Path(__file__).parent.parent / "benchmarks" / "data" / "nq_dev_10_passages.jsonl"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text of its data."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self._data, self._inside = "", False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        self._inside = tag == "script" and ("id", "data") in attributes

    def handle_endtag(self, tag):
        self._inside = False

    def handle_data(self, data):
        if self._inside:
            self._data += data

    @property
    def data(self) -> dict:
        return json.loads(self._data)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run.load(make_run(tmp_path_factory.mktemp("run") / "run", [race(at) for at in range(12)]))


@pytest.fixture(scope="module")
def answer(reader):
    passages = [Passage(p.text, title=p.title) for p in race(3).passages[:4]]
    return SpeculativeRAG(drafter=reader).answer("who won race 3?", passages)


def test_the_page_lies_in_the_folder_of_its_run(run):
    file = write_page(run.folder)
    assert file == run.folder / "page.html" and file.read_text(encoding="utf-8") == run_page(run)
    assert not [left for left in run.folder.iterdir() if left.name.startswith(".page")]


@pytest.mark.slow
def test_three_hundred_questions_of_five_systems_fit_into_two_megabytes(tmp_path):
    questions = load_questions(NQ)[:300]
    page = write_page(make_run(tmp_path / "run", questions))
    assert len(questions) == 300 and all(len(question.passages) == 10 for question in questions)
    assert page.stat().st_size < 2_000_000


def test_systems_share_the_passages(run):
    text = run_page(run)
    assert len(text) < PACKED_FROM and text.count("Race 7, heat 4: runners") == 1


def test_a_page_asks_nobody_for_anything(run, answer):
    for page in (run_page(run), answer.to_html()):
        elements = Elements(page)
        kept = [attributes for _, attributes in elements.found if "src" in attributes or "href" in attributes]
        assert kept == [{"rel": "icon", "href": "data:,"}]
        policy = next(a["content"] for _, a in elements.found if a.get("http-equiv") == "Content-Security-Policy")
        assert policy.startswith("default-src 'none'") and "unsafe" not in policy
        assert not re.search(r"https?://|@import|url\(", page)


def test_texts_make_no_elements(tmp_path):
    question = replace(race(0), question=HOSTILE, answers=(HOSTILE,), passages=(Passage(HOSTILE, title=HOSTILE),))
    run = Run.load(make_run(tmp_path / "run", [question]))
    answers = tuple(replace(row, system=f"{row.system} {HOSTILE}") for row in run.answers)
    systems = {row.system: {} for row in answers}
    info = replace(run.info, data={"source": HOSTILE}, settings={"<b>": HOSTILE}, systems=systems)
    elements = Elements(run_page(replace(run, info=info, answers=answers)))
    tags = [tag for tag, _ in elements.found]
    assert tags.count("script") == 2 and "img" not in tags and "b" not in tags
    shown = elements.data["examples"][0]
    whole = HOSTILE.replace("\0", "\u2400").replace("\ud83d", "\ufffd")
    assert [shown["question"], shown["passages"][0]["title"], shown["passages"][0]["text"]] == [whole] * 3


def test_each_filter_finds_what_it_says(run):
    question = race(1)
    gold, bad = question.answers[0], "Bob"
    votes = [draft(0, gold, right=True, score=-1), draft(1, bad, right=False, score=-2)]
    more = [draft(2, bad, right=False, score=-3)]

    def flags(text, *, right, drafts=(), **given) -> list[str]:
        made = answered("speculative", question, text, right=right, drafts=drafts, **given)
        shown = replace(run, questions=(question,), answers=(made,))
        return Elements(run_page(shown)).data["examples"][0]["rows"][0]["flags"]

    assert flags(gold, right=True, drafts=votes + more) == ["rescued"]
    assert flags(gold, right=True, drafts=votes) == []  # one vote each: no majority
    merged = [votes[0], {**votes[1], "same": [2]}]
    assert flags(gold, right=True, drafts=merged) == ["rescued"]
    assert flags(bad, right=False, drafts=[votes[1], votes[0]]) == ["missed"]
    assert flags(bad, right=False, drafts=votes[1:]) == []
    assert flags("", right=False, drafts=votes, abstained=True) == ["silent"]
    assert flags("", right=True, abstained=True) == []  # there is no answer, and the system says so


def test_systems_that_disagree_are_flagged(run):
    by_id = {example["id"]: example["flags"] for example in Elements(run_page(run)).data["examples"]}
    rights = {question.id: {row.right for row in rows_of(at, question)} for at, question in enumerate(run.questions)}
    assert by_id == {name: ["disagree"] if len(found) == 2 else [] for name, found in rights.items()}
    wrong = tuple(replace(row, right=False) for row in run.answers)
    flags = [example["flags"] for example in Elements(run_page(replace(run, answers=wrong))).data["examples"]]
    assert flags == [["nobody"]] * len(run.questions)


def test_an_unfinished_run_says_so(run):
    page = run_page(replace(run, answers=run.answers[:-7]))
    assert "7 of 60 answers are not there yet" in page
    assert "are not there yet" not in run_page(run)
    nothing = Elements(run_page(replace(run, answers=())))
    assert nothing.data["systems"] == list(SYSTEMS) and all(not e["rows"] for e in nothing.data["examples"])


def test_figures_of_a_system_stand_in_its_row(run):
    cells = re.findall(r"<tr>(.*?)</tr>", run_page(run), re.S)
    rapid = next(cell for cell in cells if "rapid" in cell)
    # one of twelve failed, which counts as wrong
    assert re.findall(r">([^<>]+)<", rapid)[:4] == ["rapid", "91.7%", "64.6% to 98.5%", "12"]
    assert "standard less speculative" in run_page(run)


def test_no_run_no_page(tmp_path):
    with pytest.raises(NotFoundError, match="no run of an evaluation"):
        write_page(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_page_that_cannot_be_written_leaves_what_is_there(tmp_path):
    folder = make_run(tmp_path / "run", [race(0)])
    (folder / "page.html").mkdir()
    (folder / "page.html" / "kept").touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(InvalidInputError, match="is a folder"):
        write_page(folder)
    assert sorted(folder.rglob("*")) == before


# --- one answer -----------------------------------------------------------------------------------------


def test_an_answers_page_holds_its_drafts_scores_and_passages(answer):
    shown = Elements(answer.to_html()).data["examples"][0]
    [row] = shown["rows"]
    assert (shown["question"], row["text"], row["outcome"]) == (answer.question, answer.text, "answered")
    drafts = [verdict.draft for verdict in answer.verdicts]
    assert [d["answer"] for d in row["drafts"]] == [d.text for d in drafts]
    assert [d["passages"] for d in row["drafts"]] == [[at + 1 for at in d.subset] for d in drafts]
    assert row["drafts"][0]["scores"]["log_score"] == pytest.approx(answer.verdicts[0].log_score, abs=1e-4)
    read = {at: p.text for d in drafts for at, p in zip(d.subset, d.passages, strict=True)}
    assert {p["number"] - 1: p["text"] for p in shown["passages"]} == read


def test_an_answer_that_abstains_or_escalates_has_a_page(answer):
    silent = replace(answer, text="", passages=(), abstained=True, reason="no draft answers", unverified=())
    [row] = Elements(silent.to_html()).data["examples"][0]["rows"]
    assert (row["outcome"], row["reason"], row["passages"]) == ("abstained", "no draft answers", [])
    assert not [draft for draft in row["drafts"] if draft["state"] == "chosen"]
    asked = replace(answer, escalated="standard", read=(0, 1), passages=(Passage("one"), Passage("two")))
    shown = Elements(asked.to_html()).data["examples"][0]
    assert shown["rows"][0]["passages"] == [1, 2] and shown["rows"][0]["drafts"][0]["state"] != "chosen"
    late = replace(answer, verdicts=(), unverified=(answer.verdicts[0].draft,), abstained=True)
    [row] = Elements(late.to_html()).data["examples"][0]["rows"]
    assert [draft["state"] for draft in row["drafts"]] == ["unverified"]


def test_a_notebook_gets_the_page_in_a_frame(answer):
    [(tag, attributes)] = Elements(answer._repr_html_()).found
    assert tag == "iframe" and attributes["sandbox"] == "allow-scripts"
    assert attributes["srcdoc"].replace(" class=framed", "") == answer.to_html()


def test_ask_writes_the_page(tmp_path, monkeypatch, minilm, reader):
    models = {"minilm": minilm, "minilm-reader": reader}
    monkeypatch.setattr("specrag.models.bundled", lambda name, **options: models[name])
    (tmp_path / "races.txt").write_text("Ada Smith won the race of 1952.")
    asked = ["ask", "who won the race of 1952?", "--docs", str(tmp_path / "races.txt")]
    result = CliRunner().invoke(app, [*asked, "--html", str(tmp_path / "answer.html")])
    assert result.exit_code == 0, result.output
    shown = Elements((tmp_path / "answer.html").read_text(encoding="utf-8")).data["examples"][0]
    assert shown["rows"][0]["text"] == "Ada Smith"


def test_ask_refuses_a_page_that_cannot_be_written_before_models_load(tmp_path, monkeypatch):
    monkeypatch.setattr("specrag.models.bundled", lambda name, **options: pytest.fail("a model was loaded"))
    (tmp_path / "races.txt").write_text("Ada Smith won.")
    result = CliRunner().invoke(app, ["ask", "who?", "--docs", str(tmp_path / "races.txt"), "--html", str(tmp_path)])
    assert result.exit_code == 1 and "is a folder" in result.stderr
