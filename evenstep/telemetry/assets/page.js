"use strict";
// Builds the page from the data; in a live page, builds it again when the data has changed.

E.curve = (runs, name, label, more = {}) =>
  runs.map((run, i) => ({
    label: runs.length > 1 ? `${label} ${run.name}` : label,
    color: E.runColor(i),
    ...(run.curves[name] ?? {}),
    ...more,
  }));

E.KINDS = {
  spike: "spike",
  loss_spike: "loss spike",
  recovered: "loss recovered",
  nonfinite: "gradient not finite",
  skipped: "gradient not finite, skipped",
  stays_nonfinite: "gradients stay not finite",
  weights_nonfinite: "weights not finite",
  useless: "gradient below its quantisation noise",
  warning: "early warning",
  guard: "action of the guard",
  reset: "moments reset",
};
E.kindColor = (kind) => E.color(kind in E.KINDS ? kind : "skipped");

E.FACTS = {
  loss: "training loss",
  val_loss: "validation loss",
  spikes: "steps with a spike",
  max_ratio: "largest spike",
  spike_rate: "spike rate",
  max_gss: "largest GSS",
  loss_spikes: "loss spikes",
  recovery_steps: "steps to recover",
  unrecovered: "not recovered",
  skipped: "steps not finite",
  weights_nonfinite: "weights not finite",
  resets: "moment resets",
  clipped: "clipped, at most",
  gradient_error: "gradient error",
  steps: "steps",
  tokens_per_second: "tokens a second",
};
E.fact = (name, value) => {
  if (!Number.isFinite(value)) return "–";
  if (name === "max_ratio") return `×${E.number(Number(value.toPrecision(3)))}`;
  if (name === "spike_rate" || name === "clipped") return `${E.number(Number((100 * value).toPrecision(3)))} %`;
  return E.number(value);
};

// One run: a tile for each number. Several: a table of them, side by side.
E.summary = (runs) => {
  const names = Object.keys(E.FACTS).filter((name) => runs.some((run) => run.facts[name])); // a zero says nothing
  const notes = runs.flatMap((run) => run.notes.map((note) => E.el("p", { className: "note" }, runs.length > 1 ? `${run.name}: ${note}` : note)));
  const bad = (run, name) => ["skipped", "unrecovered", "loss_spikes", "weights_nonfinite"].includes(name) && run.facts[name] > 0;
  const tile = (name) =>
    E.el("div", { className: bad(runs[0], name) ? "tile bad" : "tile", title: `${name}: ${E.data.facts[name]}` }, E.el("b", {}, E.fact(name, runs[0].facts[name])), E.el("span", {}, E.FACTS[name]));
  const body = runs.length > 1 ? E.sideBySide(runs, names, (run, name) => E.fact(name, run.facts[name]), { facts: E.FACTS }) : E.el("div", { className: "tiles" }, ...names.map(tile));
  return E.el("section", { className: runs.length > 1 ? "wide" : "wide bare", ariaLabel: "the run in numbers" }, ...notes, body);
};

// Zooms all charts to the steps around one, and brings the first chart into view.
E.go = (step) => {
  E.show(step - 50, step + 50);
  const chart = document.getElementById("loss") ?? E.charts[0]?.holder.closest("section");
  chart?.scrollIntoView({ block: "start" });
};

// How to print the text of data rows; null where evenstep does not know the data.
E.rowsCommand = (run, rows) => (rows && run.rows_command ? `${run.rows_command} ${rows[0]}-${rows[1]}` : null);

// The texts of data rows, folded.
E.rowTexts = (texts) =>
  texts?.length ? E.el("details", { className: "texts" }, E.el("summary", {}, "text of the rows"), ...texts.map(([row, text]) => E.el("p", {}, E.el("b", {}, `${row} `), text))) : null;

// How it went, in words: the diagnosis.
E.verdict = (runs) => {
  const told = runs.filter((run) => run.findings.length);
  if (!told.length) return null;
  const blocks = told.flatMap((run) => [
    ...(runs.length > 1 ? [E.el("h2", {}, run.name)] : []),
    ...run.findings.map((finding) => {
      const [first, ...rest] = finding.sentences;
      const show = finding.step === null ? null : E.el("button", { type: "button", ariaLabel: `show step ${finding.step}` }, `step ${finding.step}`);
      show?.addEventListener("click", () => E.go(finding.step));
      const command = E.rowsCommand(run, finding.rows);
      return E.el(
        "div",
        { className: `finding ${finding.level}` },
        E.el("p", { className: `verdict ${finding.level}` }, E.el("b", {}, first), " ", rest.join(" "), " ", show),
        finding.advice ? E.el("p", { className: "soft" }, `Try: ${finding.advice}`) : null,
        command ? E.el("p", { className: "soft" }, "Text of the rows: ", E.el("code", {}, command)) : null,
        E.rowTexts(finding.texts),
      );
    }),
    ...run.verdict.slice(run.findings.length).map((text) => E.el("p", { className: "soft" }, text)), // the loss in one sentence
  ]);
  return E.el("section", { className: "wide", id: "verdict", ariaLabel: "how it went" }, ...blocks);
};

E.eventSection = (runs) => {
  const rows = runs.flatMap((run) => run.events.filter((event) => event.event !== "reset").map((event) => ({ ...event, run: run.name })));
  if (!rows.length) return null;
  const runOf = (row) => runs.find((run) => run.name === row.run);
  const whereCell = (row) => {
    const command = E.rowsCommand(runOf(row), row.rows);
    const names = row.where + (row.count > 5 ? ` and ${row.count - 5} more` : "");
    return E.el("div", {}, names, command ? E.el("div", {}, E.el("code", {}, command)) : null, E.rowTexts(row.texts));
  };
  const columns = [
    ...(runs.length > 1 ? [{ name: "run", title: "run" }] : []),
    { name: "step", title: "step", number: true },
    { name: "event", title: "event", text: (row) => E.KINDS[row.event] ?? row.event },
    { name: "size", title: "× mean", number: true },
    { name: "where", title: "where", text: whereCell },
    { name: "before", title: "loss before", number: true },
    { name: "after", title: "loss after", number: true },
    { name: "first", title: "data rows", number: true, text: (row) => (row.rows ? `${row.rows[0]}–${row.rows[1]}` : "–") },
  ];
  for (const row of rows) row.first = row.rows ? row.rows[0] : null;
  const command = E.el("p", { className: "soft", id: "rows" });
  const lookUp = (row) => {
    const start = row && E.rowsCommand(runOf(row), row.rows);
    command.replaceChildren(...(start ? ["The text of these data rows: ", E.el("code", {}, start)] : []));
  };
  const go = (row) => {
    lookUp(row);
    E.go(row.step);
  };
  const about = E.el("p", { className: "soft" }, "Click a head to sort, a line to look at the steps around it (“all steps” leads back).");
  const table = E.table(columns, rows, { sort: ["step", false], go });
  table.id = "events";
  const worst = [...rows].sort((a, b) => (b.size ?? 0) - (a.size ?? 0));
  lookUp(rows.find((row) => row.event === "weights_nonfinite" && row.rows) ?? worst.find((row) => row.rows));
  return E.section("Events", true, about, command, table);
};

// The picture of one run with its choices; the parameter that is clicked gets a chart of its own.
E.heatSection = (title, runs, part, fields, id) => {
  const there = runs.filter((run) => run[part]);
  if (!there.length) return null;
  const chosen = (E.chosen[id] ??= { run: 0, field: null, row: null });
  const choose = (label, options, value, change) => {
    const select = E.el("select", { ariaLabel: label }, ...options.map(([key, text]) => E.el("option", { value: key }, text)));
    select.value = value;
    select.addEventListener("change", () => change(select.value));
    return select;
  };
  const [bar, holder, detail] = [E.el("div", { className: "bar" }), E.el("div", { className: "plot", id }), E.el("div")];
  const about = E.el("p", { className: "soft" }, "Drag to zoom, double-click to see all, click a row for its numbers. Colours are logarithmic.");
  const section = E.section(title, true, bar, holder, about, detail);
  const draw = () => {
    const run = there[Math.min(chosen.run, there.length - 1)];
    const heat = run[part];
    const names = Object.keys(fields).filter((name) => name in heat.fields);
    if (!names.includes(chosen.field)) chosen.field = names[0];
    const field = E.decode(heat.fields[chosen.field]);
    const ends = E.ends(field, chosen.field);
    E.charts = E.charts.filter((chart) => !section.contains(chart.holder));
    bar.replaceChildren(
      choose("number", names.map((name) => [name, fields[name]]), chosen.field, (name) => ((chosen.field = name), draw())),
      ...(there.length > 1 ? [choose("run", there.map((one, i) => [i, one.name]), chosen.run, (i) => ((chosen.run = Number(i)), draw()))] : []),
      E.scaleBar(field, ends),
    );
    holder.replaceChildren();
    const plot = E.heatChart(holder, heat, field, ends, `${fields[chosen.field]} of ${run.name}`, (row) => ((chosen.row = row), one(true)));
    E.look(plot);
    const one = (picked = false) => {
      E.charts = E.charts.filter((chart) => !detail.contains(chart.holder));
      detail.replaceChildren();
      if (chosen.row === null || chosen.row >= heat.rows.length) return;
      const lines = names.slice(0, 6).map((name, i) => ({ label: fields[name], color: E.runColor(i), ...E.rowLine(heat, name, chosen.row) }));
      const chart = E.lineChart(heat.names[chosen.row], lines, { log: true });
      detail.append(chart);
      E.look(chart.ready?.());
      if (picked) detail.scrollIntoView({ block: "nearest" });
    };
    one();
  };
  section.ready = draw;
  return section;
};

E.build = (data) => {
  const runs = data.runs;
  const zoomed = E.range && (E.range[0] > E.limits[0] || E.range[1] < E.limits[1]);
  const kept = zoomed ? E.range : null;
  E.limits = [0, Math.max(1, ...runs.map((run) => run.steps))];
  E.charts = [];
  const marks = runs.flatMap((run) => run.events.map((event) => ({ step: event.step, color: E.kindColor(event.event) })));
  const present = Object.keys(E.KINDS).filter((kind) => runs.some((run) => run.events.some((event) => event.event === kind)));
  const key = E.el("p", { className: "soft" }, ...present.flatMap((kind) => [E.key(E.kindColor(kind)), E.KINDS[kind]]));
  const other = runs.length > 1 ? { dash: [5, 4] } : { color: E.runColor(1) };
  const pair = (a, b, first, second) => [...E.curve(runs, a, first), ...E.curve(runs, b, second, other)];
  const settings = [...new Set(runs.flatMap((run) => run.config.map(([name]) => name)))];
  const configs = runs.map((run) => Object.fromEntries(run.config));
  const setting = (run, name) => configs[runs.indexOf(run)][name] ?? "–";
  const machine = [...new Set(runs.flatMap((run) => run.hardware.map(([name]) => name)))];
  const sections = [
    E.verdict(runs),
    E.summary(runs),
    E.lineChart("Loss", [...E.curve(runs, "loss", "training"), ...E.curve(runs, "val_loss", "validation", runs.length > 1 ? { dots: true, dash: [2, 3] } : { dots: true, color: E.runColor(1) })], { marks, wide: true, height: 300, about: key, id: "loss" }),
    E.heatSection("Parameters over the steps", runs, "heat", data.fields, "heat"),
    E.eventSection(runs),
    E.lineChart("Gradient norm, before and after the transforms", pair("norm", "norm_after", "before", "after"), { log: true, marks }),
    E.lineChart("Spike rate", E.curve(runs, "spike_rate", "share of recent steps")),
    E.lineChart("Learning rate", E.curve(runs, "lr", "rate")),
    E.lineChart("Entries clipped", pair("clipped_mean", "clipped_max", "mean of all tensors", "largest")),
    E.lineChart("Update over weight (RMS)", pair("update_ratio_mean", "update_ratio_max", "mean of all tensors", "largest"), { log: true }),
    E.lineChart("Largest attention logit", E.curve(runs, "attention_max", "of all heads")),
    E.lineChart("Activations (RMS)", E.curve(runs, "rms", "largest of all blocks"), { log: true }),
    E.lineChart("Output logits", pair("logit_rms", "logit_max", "root mean square", "largest")),
    E.lineChart("Tokens per second", E.curve(runs, "tokens_per_second", "speed")),
    E.heatSection("Quantised layers over the steps", runs, "lowbit", data.lowbit_fields, "quantised"),
    ...(runs.length > 1 ? [E.section("Where the configurations differ", true, E.sideBySide(runs, settings, setting, { onlyDifferent: true }))] : []),
    ...(settings.length ? [E.section("Configuration", false, E.sideBySide(runs, settings, setting))] : []),
    ...(machine.length ? [E.section("Hardware", false, E.sideBySide(runs, machine, (run, name) => Object.fromEntries(run.hardware)[name] ?? "–"))] : []),
  ].filter(Boolean);
  document.getElementById("main").replaceChildren(...sections);
  for (const section of sections) section.ready?.();
  E.show(...(kept ?? E.limits));
};

E.tools = () => {
  const root = document.documentElement;
  const button = (text, label, act) => {
    const made = E.el("button", { type: "button", ariaLabel: label, title: label }, text);
    made.addEventListener("click", act);
    return made;
  };
  const move = (shift, zoom) => {
    const [a, b] = E.range ?? E.limits;
    const [middle, half] = [(a + b) / 2 + (shift * (b - a)) / 2, ((b - a) / 2) * zoom];
    E.show(middle - half, middle + half);
  };
  const theme = button("◐", "light or dark", () => {
    root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
    E.build(E.data);
  });
  document.getElementById("tools").append(
    button("◀", "earlier steps", () => move(-1, 1)),
    button("−", "more steps", () => move(0, 2)),
    button("+", "fewer steps", () => move(0, 0.5)),
    button("▶", "later steps", () => move(1, 1)),
    button("all steps", "all steps", () => {
      E.show(...E.limits);
      for (const chart of E.charts) chart.whole?.();
    }),
    theme,
  );
  const dark = matchMedia("(prefers-color-scheme: dark)");
  root.dataset.theme = dark.matches ? "dark" : "light";
  dark.addEventListener("change", () => {
    root.dataset.theme = dark.matches ? "dark" : "light";
    E.build(E.data);
  });
};

E.poll = async (version) => {
  try {
    const answer = await fetch("data.json", { cache: "no-store", headers: version ? { "If-None-Match": version } : {} });
    if (answer.status === 200) {
      E.data = await answer.json();
      E.build(E.data);
      version = answer.headers.get("ETag");
    }
  } catch {
    // The run's server has gone; the page keeps what it has and asks again.
  }
  setTimeout(() => E.poll(version), 3000);
};

E.chosen = {};
E.data = JSON.parse(document.getElementById("data").textContent);
E.tools();
E.build(E.data);
if (E.data.live) setTimeout(() => E.poll(null), 3000);
