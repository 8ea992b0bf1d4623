// One question: its answers by system, and of one system the drafts, the scores, the choice and the passages.

const STATES = {
  chosen: "chosen",
  abstained: "abstains",
  unverified: "not verified",
  failed: "failed",
};

const LONG = 2500; // characters of a passage

const PIECES = {
  accepted: "accepted: drafted, kept by the target",
  rejected: "rejected: drafted, not kept",
  target: "the target’s own",
};

/** Draws examples into an element. `data` is the page's, see `specrag._page.examples`. */
const exampleView = (data, target) => {
  const part = data.single ? "h2" : "h3"; // below the heading of the page, or of the example
  const score = (value) => (value == null ? "–" : value.toFixed(2).replace("-", "−"));

  const draw = (example, system) => {
    const rows = example.rows;
    let shown = Math.max(0, rows.findIndex((row) => row.system === system));
    const panel = make("div", { class: "panel", id: "panel", role: rows.length > 1 ? "tabpanel" : null });
    const tabs = rows.map((row, at) =>
      make(
        "button",
        { type: "button", role: "tab", id: `tab-${at}`, "aria-controls": "panel", onclick: () => select(at) },
        said(row.system),
        " ",
        badge(row.outcome),
      ),
    );
    const select = (at, focus = false) => {
      shown = at;
      tabs.forEach((tab, i) => {
        tab.setAttribute("aria-selected", i === at ? "true" : "false");
        tab.tabIndex = i === at ? 0 : -1;
      });
      if (rows.length > 1) panel.setAttribute("aria-labelledby", `tab-${at}`);
      panel.replaceChildren(...systemParts(example, rows[at]));
      if (focus) tabs[at].focus();
    };
    const moves = { ArrowRight: 1, ArrowLeft: -1 };
    const list = make("div", {
      role: "tablist",
      class: "tabs",
      "aria-label": "Systems",
      onkeydown: (event) => {
        const ends = { Home: 0, End: rows.length - 1 };
        if (event.key in moves) select((shown + moves[event.key] + rows.length) % rows.length, true);
        else if (event.key in ends) select(ends[event.key], true);
        else return;
        event.preventDefault();
      },
    });
    list.append(...tabs);
    target.replaceChildren(...heading(example), ...(rows.length > 1 ? [list] : []), panel);
    if (rows.length) select(shown);
    else panel.append(make("p", { class: "quiet" }, "No system has answered this question."));
    return () => rows[shown]?.system;
  };

  const heading = (example) => {
    const parts = [];
    if (!data.single) {
      parts.push(make("h2", { id: "example-heading", dir: "auto" }, example.question));
      const gold = example.gold.map((text) => make("li", {}, said(text)));
      const none = example.unanswerable ? "none: the right reaction is to abstain" : "not given";
      parts.push(
        make(
          "div",
          { class: "gold-line" },
          make("span", { class: "label" }, "Right answers"),
          gold.length ? make("ul", { class: "inline" }, gold) : make("span", {}, none),
          make("span", { class: "quiet" }, said(example.id)),
        ),
      );
    }
    if (example.choices) {
      const letter = (at) => String.fromCharCode(65 + at);
      const items = example.choices.map((text, at) => make("li", {}, `${letter(at)}. `, said(text)));
      parts.push(make("ul", { class: "plain" }, items));
    }
    if (example.turns) {
      const turns = example.turns.map(([question, reply]) =>
        make("li", {}, said(question, "p"), reply && make("p", { class: "quiet", dir: "auto" }, reply)),
      );
      parts.push(make("ol", {}, turns));
    }
    if (example.document) {
      parts.push(make("p", { class: "quiet" }, `Asked of a document of ${plural(example.document, "character")}.`));
    }
    return parts;
  };

  const systemParts = (example, row) => {
    const cards = new Map();
    return [
      answerCard(example, row),
      row.pieces.length && rapidPart(row.pieces),
      row.drafts.length && draftsPart(example, row, (numbers, name) => pick(cards, numbers, name)),
      row.critiques.length && critiquesPart(row.critiques),
      example.passages.length && passagesPart(example, row, cards),
    ].filter(Boolean);
  };

  // --- the answer ---------------------------------------------------------------------------------------

  const answerCard = (example, row) => {
    const facts = [
      ["time", seconds(row.seconds)],
      ["confidence", row.confidence == null ? null : row.confidence.toFixed(2)],
      ["from passages", row.passages.length ? row.passages.join(", ") : null],
      ...row.facts,
      ...Object.entries(row.metrics).map(([name, value]) => [name.replaceAll("_", " "), value.toFixed(2)]),
      ...row.tokens.map(([role, read, wrote]) => [
        `${role} tokens`,
        `${read.toLocaleString("en")} read, ${wrote.toLocaleString("en")} written`,
      ]),
    ].filter(([, value]) => value != null);
    const text = row.outcome === "failed" ? row.error : row.text || row.reason || "No answer.";
    const quiet = row.text && row.outcome !== "failed" ? "" : " quiet";
    return make(
      "section",
      { class: "card answer", "aria-label": "Answer" },
      make("p", { class: `said${quiet}`, dir: "auto" }, marked(text, { gold: finder(example.gold) })),
      row.rationale && make("p", { class: "rationale", dir: "auto" }, row.rationale),
      make(
        "dl",
        { class: "facts small" },
        facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", { dir: "auto" }, value))),
      ),
      timeline(row),
      row.notes.length > 0 &&
        make("ul", { class: "notes" }, row.notes.map((note) => make("li", { dir: "auto" }, note))),
    );
  };

  /** The stages as one bar. Stages that overlap make it longer than the whole took: it shows shares. */
  const timeline = (row) => {
    const stages = Object.entries(row.timings);
    const sum = stages.reduce((total, [, value]) => total + value, 0);
    if (!sum) return null;
    const text = stages.map(([name, value]) => `${name} ${seconds(value)}`).join(", ");
    const bar = stages.map(([, value], at) => {
      const part = make("span", { class: `stage s${at % 6}` });
      part.style.flexGrow = value / sum;
      return part;
    });
    const names = stages.map(([name, value], at) =>
      make("li", {}, make("span", { class: `dot s${at % 6}`, "aria-hidden": "true" }), `${name} ${seconds(value)}`),
    );
    return make(
      "div",
      { class: "timeline" },
      make("div", { class: "stages", role: "img", "aria-label": `Stages: ${text}` }, bar),
      make("ul", { class: "inline quiet" }, names),
    );
  };

  // --- RAPID --------------------------------------------------------------------------------------------

  const rapidPart = (made) => {
    const pieces = made.map(([text, kind]) => make("span", { class: `piece ${kind}` }, text));
    const count = (kind) => made.filter((piece) => piece[1] === kind).length;
    const legend = Object.entries(PIECES).map(([kind, name]) =>
      make("li", {}, make("span", { class: `piece ${kind}` }, "text"), ` ${name} (${count(kind)})`),
    );
    return make(
      "section",
      { "aria-label": "How the text was decoded" },
      make(part, { class: "part" }, "Decoding"),
      make("ul", { class: "inline legend" }, legend),
      make("p", { class: "card decoded", dir: "auto" }, pieces),
    );
  };

  // --- drafts -------------------------------------------------------------------------------------------

  const draftsPart = (example, row, onpick) => {
    const columns = Object.keys(data.scores).filter((name) => row.drafts.some((draft) => draft.scores[name] != null));
    const counted = new Set(row.counting);
    const several = new Set(row.drafts.map((draft) => draft.drafter).filter(Boolean)).size > 1;
    const heads = columns.map((name) =>
      make(
        "th",
        { scope: "col", class: "number", title: counted.has(name) ? "counts for the choice" : null },
        data.scores[name],
        counted.has(name) && make("span", { class: "counts" }, "counts"),
      ),
    );
    const lines = row.drafts.map((draft) => {
      const numbers = draft.passages.join(", ");
      return make(
        "tr",
        { class: draft.state || null },
        make("td", { class: "number" }, String(draft.number)),
        make(
          "td",
          { class: "wide" },
          make("p", { class: "said", dir: "auto" }, draft.answer || "no answer"),
          draft.rationale && make("p", { class: "rationale", dir: "auto" }, draft.rationale),
          make(
            "p",
            { class: "tags" },
            draft.state && make("span", { class: `tag ${draft.state}` }, STATES[draft.state]),
            draft.right != null && badge(draft.right ? "right" : "wrong"),
            draft.same.length > 0 &&
              make("span", { class: "tag" }, `same answer as draft ${draft.same.join(", ")}`),
            several && draft.drafter && make("span", { class: "quiet" }, said(draft.drafter)),
          ),
        ),
        make(
          "td",
          {},
          numbers &&
            make(
              "button",
              {
                type: "button",
                class: "link",
                "aria-label": `Show passages ${numbers} of draft ${draft.number}`,
                onclick: () => onpick(draft.passages, `draft ${draft.number}`),
              },
              numbers,
            ),
        ),
        columns.map((name) => make("td", { class: "number" }, score(draft.scores[name]))),
      );
    });
    return make(
      "section",
      { "aria-label": "Drafts" },
      make(part, { class: "part" }, "Drafts ", make("span", { class: "quiet" }, "best first; scores in nats, higher is better")),
      scrolling(
        "Drafts and scores",
        make(
          "table",
          { class: "drafts" },
          make(
            "thead",
            {},
            make(
              "tr",
              {},
              make("th", { scope: "col", class: "number" }, "#"),
              make("th", { scope: "col" }, "draft"),
              make("th", { scope: "col" }, "passages"),
              heads,
            ),
          ),
          make("tbody", {}, lines),
        ),
      ),
    );
  };

  /** What a corrective or self-reflective system judged, one line per passage or part of one. */
  const critiquesPart = (critiques) => {
    const names = [...new Set(critiques.flatMap((critique) => Object.keys(critique)))];
    const numeric = new Set(names.filter((name) => critiques.every((one) => typeof (one[name] ?? 0) === "number")));
    const shown = (name, value) => (numeric.has(name) && !Number.isInteger(value) ? score(value) : String(value ?? "–"));
    const attributes = (name) => ({ class: numeric.has(name) ? "number" : null });
    const lines = critiques.map((critique) =>
      make("tr", {}, names.map((name) => make("td", { dir: "auto", ...attributes(name) }, shown(name, critique[name])))),
    );
    const heads = names.map((name) => make("th", { scope: "col", ...attributes(name) }, name.replaceAll("_", " ")));
    return make(
      "section",
      { "aria-label": "Judgements" },
      make(part, { class: "part" }, "Judgements"),
      scrolling(
        "What was judged",
        make("table", {}, make("thead", {}, make("tr", {}, heads)), make("tbody", {}, lines)),
      ),
    );
  };

  // --- passages -----------------------------------------------------------------------------------------

  /** Show the passages with these numbers and hide the others; all, when the numbers are null. */
  const pick = (cards, numbers, name) => {
    for (const [number, card] of cards) card.hidden = numbers !== null && !numbers.includes(number);
    const group = byId("perspectives");
    for (const chip of group.querySelectorAll("button")) {
      chip.setAttribute("aria-pressed", String(chip.dataset.name === name));
    }
    group.scrollIntoView({ block: "nearest" });
  };

  const passagesPart = (example, row, cards) => {
    const finders = { gold: finder(example.gold), chosen: row.text ? finder([row.text]) : null };
    const readers = new Map(example.passages.map((passage) => [passage.number, []]));
    for (const draft of row.drafts) for (const number of draft.passages) readers.get(number)?.push(draft.number);
    for (const passage of example.passages) {
      const by = [...new Set(readers.get(passage.number))].sort((a, b) => a - b);
      cards.set(passage.number, passageCard(passage, by, row.passages.includes(passage.number), finders));
    }
    const groups = [["all", null], ...row.drafts.map((draft) => [`draft ${draft.number}`, draft.passages])];
    const drafted = row.drafts.length > 0;
    if (row.passages.length) groups.splice(1, 0, ["of the answer", row.passages]);
    const chips = groups.map(([name, numbers]) =>
      make(
        "button",
        {
          type: "button",
          class: "chip",
          "data-name": name,
          "aria-pressed": String(numbers === null),
          onclick: () => pick(cards, numbers, name),
        },
        name,
        numbers && make("span", { class: "quiet" }, ` ${numbers.join(", ")}`),
      ),
    );
    return make(
      "section",
      { "aria-label": "Passages" },
      make(part, { class: "part" }, "Passages ", drafted && make("span", { class: "quiet" }, "by perspective: what each draft has read")),
      drafted &&
        make("div", { id: "perspectives", class: "chips", role: "group", "aria-label": "Show the passages of" }, chips),
      make(
        "ul",
        { class: "inline legend" },
        finders.gold && make("li", {}, make("mark", { class: "gold" }, "right answer")),
        finders.chosen && make("li", {}, make("mark", { class: "chosen" }, "this system’s answer")),
      ),
      make("div", { class: "passages" }, [...cards.values()]),
    );
  };

  const passageCard = (passage, by, read, finders) =>
    make(
      "article",
      { class: `card passage${read ? " read" : ""}` },
      make(
        data.single ? "h3" : "h4",
        { class: "name" },
        make("span", { class: "index" }, String(passage.number)),
        passage.title ? said(passage.title) : make("span", { class: "quiet" }, "no title"),
      ),
      make(
        "p",
        { class: "tags" },
        read && make("span", { class: "tag chosen" }, "of the answer"),
        passage.gold && make("span", { class: "tag goldtag" }, "marked as the right passage"),
        by.length > 0 && make("span", { class: "tag" }, `${by.length > 1 ? "drafts" : "draft"} ${by.join(", ")}`),
        passage.score != null && make("span", { class: "quiet" }, `retriever’s score ${passage.score.toFixed(3)}`),
      ),
      make(
        "p",
        // Long texts scroll in a box of their own, by keyboard too.
        { dir: "auto", ...(passage.text.length > LONG ? { class: "text long", tabindex: "0" } : { class: "text" }) },
        marked(passage.text, finders),
      ),
    );

  return { draw };
};
