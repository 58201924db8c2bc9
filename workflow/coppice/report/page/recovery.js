// Recovery

const MOST_RUNS = 6; // drawn at first: more bands would hide each other
const recovery = { inputs: new Map() };

function buildRecovery() {
  const section = byId("recovery");
  section.append(heading("recovery", "Recovery curves"));
  if (!recoveries.length) {
    section.append(empty("No node was trained after compression."));
    return;
  }
  const fits = Object.entries(laws).filter(([, law]) => law.runs && Object.keys(law.runs).length);
  recovery.law = chooser("Law", [["", [["", "none"], ...fits.map(([name]) => [name, name])]]], state.law, (law) =>
    change({ law }, drawRecovery),
  );
  recovery.excess = checkbox("Loss above the dense model's", state.excess, (excess) =>
    change({ excess }, drawRecovery),
  );
  recovery.chart = make("div", { class: "chart", id: "recovery-chart", role: "img" });
  recovery.sentence = make("p", { class: "note" });
  recovery.rows = foldable("These curves as a table", recoveryTable);
  const chips = recoveries.map((run) => {
    const chip = checkbox(run.node, true, (on) => turnRun(run.node, on), mark(runShape(run), inColor(run.model), true));
    chip.input.value = run.node;
    recovery.inputs.set(run.node, chip.input);
    return chip.label;
  });
  const every = (text, runs) => quiet(text, () => change({ runs: new Set(runs) }, drawRecovery), `Runs: ${text}`);
  section.append(
    make("div", { class: "controls" }, recovery.law.label, make("div", { class: "chips" }, recovery.excess.label)),
    make(
      "fieldset",
      { class: "runs" },
      make("legend", {}, "Runs"),
      make(
        "div",
        { class: "chips" },
        chips,
        every(
          "all",
          recoveries.map(({ node }) => node),
        ),
        every("none", []),
      ),
    ),
    make(
      "figure",
      {},
      recovery.chart,
      make(
        "figcaption",
        { class: "note" },
        "Validation loss during recovery. Large markers: the study's token budgets. Lines: the law's prediction with " +
          "its 95% bootstrap band; dashed on the shaded background, where it extrapolates. Thin horizontal lines: " +
          "the dense models.",
      ),
    ),
    recovery.sentence,
    recovery.rows.details,
  );
}

/** The runs that are drawn: the chosen ones, or else the first of each model. */
function runsShown() {
  if (state.runs) return recoveries.filter(({ node }) => state.runs.has(node));
  if (recoveries.length <= MOST_RUNS) return recoveries;
  const share = Math.max(1, Math.floor(MOST_RUNS / new Set(recoveries.map(({ model }) => model)).size));
  const counts = new Map();
  return recoveries.filter(({ model }) => {
    counts.set(model, (counts.get(model) ?? 0) + 1);
    return counts.get(model) <= share;
  });
}

function turnRun(name, on) {
  const runs = new Set(runsShown().map(({ node }) => node));
  on ? runs.add(name) : runs.delete(name);
  change({ runs }, drawRecovery);
}

const runShape = (run) =>
  RUN_SHAPES[recoveries.filter(({ model }) => model === run.model).indexOf(run) % RUN_SHAPES.length];

function drawRecovery() {
  if (!recovery.chart) return;
  const runs = runsShown();
  const law = laws[state.law];
  recovery.law.select.value = state.law;
  recovery.law.label.hidden = recovery.law.select.options.length < 2;
  recovery.excess.input.checked = state.excess;
  for (const [name, input] of recovery.inputs) input.checked = runs.some(({ node }) => node === name);
  recovery.sentence.textContent = (law?.sentence ?? "").replaceAll("`", "");
  const fits = runs.map((run) => ({ run, fit: law?.runs?.[run.node] ?? null }));
  const width = widthOf(recovery.chart);
  const margin = { l: width < 520 ? 52 : 66, r: 14, t: 22, b: 54 };
  const layout = baseLayout(width, Math.round(Math.min(480, Math.max(340, width * 0.48))), margin);
  const range = recoveryRanges(fits);
  layout.xaxis = axis("recovery tokens", range.x, true);
  layout.yaxis = axis(
    state.excess ? "validation loss above the dense model's, nats per token" : "validation loss, nats per token",
    range.y,
    range.log,
  );
  Object.assign(layout, beyond(fits, range));
  if (!runs.length) layout.annotations = [nothing("No run is chosen.")];
  plot(
    recovery.chart,
    [...denseLines(runs, range), ...fits.flatMap((one) => fitTraces(one, range)), ...runs.map(runTrace)],
    layout,
    CONFIG,
  );
  recovery.chart.setAttribute(
    "aria-label",
    `Recovery curves of ${plural(runs.length, "run")}; the table below has the same values.`,
  );
  recovery.rows.refresh();
}

const lossOf = (run, loss) => (loss === null ? null : loss - (state.excess ? run.dense_loss : 0));

function recoveryRanges(fits) {
  if (!fits.length) return { x: [1e3, 1e6], y: [0, 1], log: false };
  const tokens = fits.flatMap(({ run, fit }) => [...run.tokens.filter((one) => one > 0), ...(fit?.tokens ?? [])]);
  const losses = fits.flatMap(({ run, fit }) => [
    ...run.loss.filter((loss, place) => loss !== null && run.tokens[place] > 0).map((loss) => lossOf(run, loss)),
    ...(fit?.loss ?? []).filter((loss) => loss !== null).map((loss) => lossOf(run, loss)),
    ...(state.excess ? [] : [run.dense_loss]),
  ]);
  const log = losses.every((loss) => loss > 0) && Math.max(...losses) > 2 * Math.min(...losses);
  return { x: rangeOf(tokens, [], true), y: rangeOf(losses, [], log), log };
}

/** The shaded background beyond the last tokens that the law was fitted to on any shown run. */
function beyond(fits, range) {
  const last = Math.max(...fits.filter(({ fit }) => fit).map(({ fit }) => fit.fitted_to));
  if (!Number.isFinite(last)) return {};
  return {
    shapes: [
      {
        type: "rect",
        layer: "below",
        yref: "paper",
        x0: last,
        x1: range.x[1],
        y0: 0,
        y1: 1,
        line: { width: 0 },
        fillcolor: themeColor("shade"),
      },
    ],
    annotations: [
      {
        text: "extrapolated",
        x: Math.log10(Math.sqrt(last * range.x[1])),
        yref: "paper",
        y: 1,
        yanchor: "bottom",
        showarrow: false,
        font: { size: 12, color: themeColor("muted") },
      },
    ],
  };
}

/** Thin lines at the loss of each dense model. */
function denseLines(runs, range) {
  if (state.excess) return [];
  const lines = new Map(runs.map(({ model, dense_loss }) => [`${model} ${dense_loss}`, { model, loss: dense_loss }]));
  return [...lines.values()].map(({ model, loss }) => ({
    x: range.x,
    y: [loss, loss],
    mode: "lines",
    name: `${model}, dense`,
    text: `${plain(model)}, dense: ${formatNumber(loss)}`,
    hoverinfo: "text",
    line: { color: faint(colorOf.get(model), 0.6), width: 1, dash: "2px,3px" },
  }));
}

/** The law's band, its line where it was fitted, and dashed its line beyond. */
function fitTraces({ run, fit }, range) {
  if (!fit) return [];
  const color = colorOf.get(run.model);
  const loss = fit.loss.map((one) => lossOf(run, one));
  const last = fit.tokens.filter((tokens) => tokens <= fit.fitted_to).length;
  const line = (from, to, dash) => ({
    x: fit.tokens.slice(from, to),
    y: loss.slice(from, to),
    mode: "lines",
    hoverinfo: "skip",
    name: `${run.node}: ${state.law}`,
    line: { color: themeColor(color), width: 1.6, dash },
  });
  const lines = [line(0, last, "solid"), line(Math.max(last - 1, 0), loss.length, "6px,4px")];
  if (!fit.low || !fit.high) return lines;
  const floor = range.log ? range.y[0] / 10 : -Infinity; // a log axis has no zero
  const ends = (values) => values.map((one) => (one === null ? null : Math.max(lossOf(run, one), floor)));
  return [
    {
      x: [...fit.tokens, ...[...fit.tokens].reverse()],
      y: [...ends(fit.low), ...ends(fit.high).reverse()],
      mode: "lines",
      fill: "toself",
      fillcolor: faint(color, 0.12),
      line: { width: 0 },
      hoverinfo: "skip",
      name: `${run.node}: band`,
    },
    ...lines,
  ];
}

function runTrace(run) {
  const drawn = [...run.tokens.keys()].filter((place) => run.tokens[place] > 0 && run.loss[place] !== null);
  const color = colorOf.get(run.model);
  return {
    x: drawn.map((place) => run.tokens[place]),
    y: drawn.map((place) => lossOf(run, run.loss[place])),
    mode: "markers",
    name: run.node,
    text: drawn.map((place) => `<b>${plain(run.node)}</b><br>${pointText(run, place)}`),
    hoverinfo: "text",
    marker: {
      color: themeColor(color),
      opacity: 1,
      symbol: runShape(run),
      size: drawn.map((place) => (run.budget?.[place] ? 10 : 5)),
      line: { width: 1, color: themeColor("paper") },
    },
  };
}

const pointText = (run, place) =>
  `${formatCount(run.tokens[place])} tokens: ${formatNumber(run.loss[place], 4)} nats per token`;

function recoveryTable() {
  const rows = runsShown().flatMap((run) =>
    run.tokens.map((tokens, place) => [
      run.node,
      formatCount(tokens),
      formatNumber(run.loss[place], 4),
      formatNumber(run.dense_loss, 4),
      run.budget?.[place] ? "yes" : "",
    ]),
  );
  return table(["run", "tokens", "validation loss, nats per token", "dense model's", "a budget"], rows);
}
