// The table of a run's examples: sorted, filtered, walked through by keyboard, each opened in the dialog.

const FLAGS = {
  rescued: "verifier rescued a bad majority",
  missed: "chose wrongly although a right draft was there",
  silent: "abstained wrongly",
  disagree: "systems disagree",
  nobody: "no system is right",
};

const exampleTable = (data) => {
  const dialog = byId("dialog");
  const body = byId("examples").tBodies[0];
  const view = exampleView(data, byId("example"));
  const pressed = new Set();
  let sorting = { name: "number", down: false };
  let visible = [];
  let open = -1; // position in `visible`
  let systemShown = () => undefined;

  const lines = data.examples.map((example, at) => {
    const bySystem = Object.fromEntries(example.rows.map((row) => [row.system, row]));
    const texts = [example.question, example.id, ...example.gold];
    for (const row of example.rows) {
      texts.push(row.text, row.rationale || "");
      for (const draft of row.drafts) texts.push(draft.answer || "", draft.rationale || "");
    }
    const button = make("button", { type: "button", class: "open" }, said(example.question));
    const line = { example, at, bySystem, button, haystack: texts.join("\n").toLowerCase() };
    button.addEventListener("click", () => show(visible.indexOf(line)));
    line.element = make(
      "tr",
      {},
      make("td", { class: "number" }, String(at + 1)),
      make("th", { scope: "row", class: "question" }, button),
      make("td", { class: "gold-cell" }, said(example.gold.join(" · ") || (example.unanswerable ? "no answer" : "–"))),
      data.systems.map((name) => outcomeCell(bySystem[name])),
    );
    return line;
  });

  function outcomeCell(row) {
    if (!row) return make("td", { class: "quiet" }, "–");
    return make(
      "td",
      { class: "outcome", title: row.text || row.error || row.reason || "" },
      badge(row.outcome),
      make("span", { class: "quiet time" }, seconds(row.seconds)),
    );
  }

  // --- sorting ------------------------------------------------------------------------------------------

  const alphabet = new Intl.Collator("en", { numeric: true });
  const outcome = (name) => (line) => {
    const row = line.bySystem[name];
    return row ? ORDER.indexOf(row.outcome) : ORDER.length;
  };
  const keys = {
    number: (line) => line.at,
    question: (line) => line.example.question,
    gold: (line) => line.example.gold.join(" "),
  };
  data.systems.forEach((name, at) => {
    keys[`outcome-${at}`] = outcome(name);
    keys[`seconds-${at}`] = (line) => line.bySystem[name]?.seconds ?? Infinity;
  });

  const heads = new Map();
  const sortButton = (name, label, described) =>
    make(
      "button",
      {
        type: "button",
        class: "sort",
        "data-sort": name,
        "aria-label": described || `Sort by ${label}`,
        onclick: () => {
          sorting = { name, down: sorting.name === name && !sorting.down };
          update();
        },
      },
      label,
      make("span", { class: "arrow", "aria-hidden": "true" }),
    );
  const head = (names, attributes, ...children) => {
    const cell = make("th", { scope: "col", ...attributes }, children);
    names.forEach((name) => heads.set(name, cell));
    return cell;
  };
  byId("examples").tHead.rows[0].append(
    head(["number"], { class: "number" }, sortButton("number", "#", "Sort by number")),
    head(["question"], {}, sortButton("question", "question")),
    head(["gold"], {}, sortButton("gold", "right answers")),
    ...data.systems.map((name, at) =>
      head(
        [`outcome-${at}`, `seconds-${at}`],
        {},
        sortButton(`outcome-${at}`, said(name), `Sort by outcome of ${name}`),
        sortButton(`seconds-${at}`, "time", `Sort by time of ${name}`),
      ),
    ),
  );

  // --- filters ------------------------------------------------------------------------------------------

  const system = byId("system");
  data.systems.forEach((name) => system.append(make("option", { value: name }, name)));
  const chips = Object.entries(FLAGS).map(([flag, label]) => {
    const chip = make(
      "button",
      {
        type: "button",
        class: "chip",
        "data-flag": flag,
        "aria-pressed": "false",
        onclick: () => {
          if (!pressed.delete(flag)) pressed.add(flag);
          update();
        },
      },
      label,
      make("span", { class: "quiet amount" }),
    );
    byId("chips").append(chip);
    return [flag, chip];
  });
  const has = (line, flag) =>
    line.example.flags.includes(flag) ||
    line.example.rows.some((row) => (!system.value || row.system === system.value) && row.flags.includes(flag));

  const update = () => {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const key = keys[sorting.name];
    const sign = sorting.down ? -1 : 1;
    const found = lines.filter((line) => words.every((word) => line.haystack.includes(word)));
    visible = found
      .filter((line) => [...pressed].every((flag) => has(line, flag)))
      .sort((a, b) => {
        const [x, y] = [key(a), key(b)];
        return sign * (typeof x === "string" ? alphabet.compare(x, y) : x - y) || a.at - b.at;
      });
    body.replaceChildren(...visible.map((line) => line.element));
    for (const [flag, chip] of chips) {
      chip.setAttribute("aria-pressed", String(pressed.has(flag)));
      chip.querySelector(".amount").textContent = ` ${found.filter((line) => has(line, flag)).length}`;
    }
    for (const cell of new Set(heads.values())) cell.removeAttribute("aria-sort");
    heads.get(sorting.name).setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    for (const button of document.querySelectorAll(".sort")) {
      const arrow = button.dataset.sort === sorting.name ? (sorting.down ? " ▼" : " ▲") : "";
      button.querySelector(".arrow").textContent = arrow;
    }
    const count = visible.length === lines.length ? "" : `${visible.length.toLocaleString("en")} of `;
    byId("count").textContent = `${count}${plural(lines.length, "example")}`;
    rove(visible[0]);
  };

  // --- keyboard and the dialog --------------------------------------------------------------------------

  /** One row of the table is reached by Tab; the arrows move from there. */
  const rove = (line) => {
    for (const other of lines) other.button.tabIndex = other === line ? 0 : -1;
  };

  body.addEventListener("keydown", (event) => {
    const at = visible.findIndex((line) => line.button === event.target);
    const last = visible.length - 1;
    const aims = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + 10, PageUp: at - 10, Home: 0, End: last };
    if (at < 0 || !(event.key in aims)) return;
    event.preventDefault();
    visible[Math.min(Math.max(aims[event.key], 0), last)].button.focus();
  });
  body.addEventListener("focusin", (event) => {
    const line = visible.find((other) => other.button === event.target);
    if (line) rove(line);
  });

  const show = (at) => {
    if (at < 0 || at >= visible.length) return;
    open = at;
    systemShown = view.draw(visible[at].example, systemShown() || system.value);
    byId("place").textContent = `${at + 1} of ${visible.length}`;
    byId("previous").disabled = at === 0;
    byId("next").disabled = at === visible.length - 1;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    byId("example").focus({ preventScroll: true });
  };

  byId("previous").addEventListener("click", () => show(open - 1));
  byId("next").addEventListener("click", () => show(open + 1));
  byId("close").addEventListener("click", () => dialog.close());
  dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
  dialog.addEventListener("close", () => visible[open]?.button.focus());
  dialog.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j") show(open + 1);
    else if (event.key === "k") show(open - 1);
  });

  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("search").addEventListener("input", update);
  system.addEventListener("change", update);
  byId("reset").addEventListener("click", () => {
    pressed.clear();
    byId("search").value = system.value = "";
    update();
  });
  update();
};
