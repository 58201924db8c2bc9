// Size, latency and quality

const NARROW = 832; // pixels: in a narrower window the switches are folded at first
const MOST_TAKEN = 12; // nodes of the front that are listed
const frontier = { zoom: null };

function buildFrontier() {
  const section = byId("frontier");
  section.append(heading("frontier", "What to take"));
  if (!usable.sizes.length && !usable.qualities.length) {
    section.append(empty("Nothing was measured yet: no node has a size or a quality."));
    return;
  }
  const options = [
    ["Size", usable.sizes.filter(({ id }) => !isCost(id))],
    ["Measured cost", usable.sizes.filter(({ id, simulated }) => isCost(id) && !simulated)],
    ["Simulated cost", usable.sizes.filter(({ id, simulated }) => isCost(id) && simulated)],
    ["Quality", usable.qualities],
  ].map(([title, measures]) => [title, measures.map((measure) => [measure.id, withUnit(measure)])]);
  const moved = (key) => (value) => {
    frontier.zoom = null;
    change({ [key]: value }, drawFrontier);
  };
  const flag = (key, text) =>
    checkbox(text, state[key], (on) => {
      frontier.zoom = null;
      change({ [key]: on }, drawFrontier);
    });
  const scale = (key, text) =>
    checkbox(text, isLog(key), (on) => {
      frontier.zoom = null;
      change({ [`${key}other`]: on !== Boolean(measureOf.get(state[key]).log) }, drawFrontier);
    });
  frontier.axes = {
    x: chooser("Across", options, state.x, moved("x")),
    y: chooser("Up", options, state.y, moved("y")),
  };
  frontier.flags = {
    front: flag("front", "Front only"),
    intervals: flag("intervals", "95% intervals"),
    join: flag("join", "Join what is not told apart"),
    names: flag("names", "Names"),
    xother: scale("x", "Log scale across"),
    yother: scale("y", "Log scale up"),
  };
  frontier.chart = make("div", { class: "chart", id: "frontier-chart", role: "img" });
  buildMarks();
  listenToPointer();
  frontier.take = make("div", { class: "take" });
  frontier.status = make("p", { class: "status", role: "status", "aria-live": "polite" });
  frontier.chosen = make("div", { class: "chosen" });
  frontier.rows = folded("These points as a table", frontierTable);
  section.append(
    make(
      "div",
      { class: "controls" },
      frontier.axes.x.label,
      frontier.axes.y.label,
      make(
        "div",
        { class: "chips", role: "group", "aria-label": "What the chart shows" },
        Object.values(frontier.flags).map(({ label }) => label),
      ),
    ),
    make(
      "details",
      { open: innerWidth > NARROW },
      make("summary", {}, "Switch nodes on and off"),
      make("div", { class: "switches" }, GROUPS.map(switches)),
    ),
    make("figure", {}, frontier.chart, layer.root, layer.tip, make("figcaption", { class: "note" }, FRONTIER_CAPTION)),
    frontier.status,
    frontier.take,
    frontier.chosen,
    frontier.rows.details,
  );
}

const FRONTIER_CAPTION =
  "Colour: model. Shape: last step, filled where the node was recovered on its path. Dashed: the front, which no shown " +
  "node beats in both directions. Thin lines join neighbours that are not told apart. Bars: 95% intervals; of measured " +
  "costs, half the interquartile range of the repeats to either side. Click a node to read about it below, and a " +
  "second one to compare the two.";

/** The switches of one group; a group of one value has none. */
function switches(group) {
  const values = [...new Set(nodes.map(group.of))];
  if (group.key === "budget") values.sort((a, b) => a - b);
  group.values = values;
  group.inputs = new Map();
  if (values.length < 2) return null;
  const chips = values.map((value) => {
    const chip = checkbox(switchText(group, value), true, (on) => turn(group, [value], on), switchMark(group, value));
    chip.input.dataset.group = group.key;
    chip.input.value = value;
    group.inputs.set(value, chip.input);
    return chip.label;
  });
  const every = (text, on) => quiet(text, () => turn(group, values, on), `${group.title}: ${text}`);
  return make(
    "fieldset",
    {},
    make("legend", {}, group.title),
    make("div", { class: "chips" }, chips, values.length > 2 ? [every("all", true), every("none", false)] : []),
  );
}

const switchText = (group, value) =>
  group.key === "composition"
    ? arrows(value)
    : group.key !== "budget"
      ? value
      : value === "0"
        ? "none"
        : counted(Number(value));

function switchMark(group, value) {
  if (group.key === "model") return mark("circle", inColor(value), true);
  return group.key === "family" ? mark(SHAPES[value] ?? "circle", "currentColor", false) : null;
}

function turn(group, values, on) {
  for (const value of values) on ? state.off[group.key].delete(value) : state.off[group.key].add(value);
  frontier.zoom = null;
  change({}, drawFrontier);
}

/** The nodes that the switches let through and both axes know: [{node, x, y}], with values and ends. */
function shownPoints() {
  return nodes
    .filter((node) => GROUPS.every(({ key, of }) => !state.off[key].has(of(node))))
    .map((node) => ({ node, x: measured(state.x, node.node), y: measured(state.y, node.node) }))
    .filter(({ x, y }) => x && y);
}

/** The points that no other beats in both directions, from the best across to the best up. */
function frontOf(points) {
  const [across, up] = [lowerIsBetter(state.x) ? 1 : -1, lowerIsBetter(state.y) ? 1 : -1];
  const ordered = [...points].sort((a, b) => across * (a.x[0] - b.x[0]) || up * (a.y[0] - b.y[0]));
  let best = Infinity;
  return ordered.filter(({ y }) => {
    const better = up * y[0] < best;
    if (better) best = up * y[0];
    return better;
  });
}

/** Whether an axis is logarithmic: as its measure says, or the other way where the reader turned it. */
const isLog = (key) => Boolean(measureOf.get(state[key]).log) !== state[`${key}other`];

function drawFrontier() {
  if (!frontier.chart) return;
  frontier.width = widthOf(frontier.chart); // read first: after changes of the page it would have to be laid out again
  syncFrontier();
  const all = shownPoints();
  const front = frontOf(all);
  frontier.points = state.front ? front : all;
  frontier.front = front;
  const ranges = frontier.zoom ?? naturalRanges(frontier.points);
  const layout = frontierLayout(frontier.width, ranges);
  drawFrame(layout);
  drawMarks(frontier.points, front, ranges, layout);
  tellFrontier();
  frontier.rows.refresh();
}

function frontierLayout(width, ranges) {
  const margin = { l: width < 520 ? 52 : 66, r: 14, t: 14, b: 54 };
  const layout = baseLayout(width, Math.round(Math.min(560, Math.max(360, width * 0.56))), margin);
  layout.hovermode = false;
  if (!frontier.points.length) layout.annotations = [nothing("No node is shown: switch something on.")];
  layout.xaxis = axis(withBetter(state.x), ranges.x, isLog("x"), (width - margin.l) / 75, tickFormat(state.x));
  layout.yaxis = axis(withBetter(state.y), ranges.y, isLog("y"), layout.height / 50, tickFormat(state.y));
  return layout;
}

/** The axes, by Plotly, where they are not drawn so already. */
function drawFrame(layout) {
  const frame = JSON.stringify(layout);
  if (frame === frontier.frame) return;
  frontier.frame = frame;
  const picture = { name: "picture", title: "Save the chart as SVG", icon: Plotly.Icons.camera, click: savePicture };
  const removed = [...CONFIG.modeBarButtonsToRemove, "pan2d", "toImage"]; // a pan would leave the marks behind
  Plotly.react(frontier.chart, [], layout, {
    ...CONFIG,
    modeBarButtonsToRemove: removed,
    modeBarButtonsToAdd: [picture],
  });
  listenFrontier();
}

const tickFormat = (id) => (value) => quantity(id, value, counted).replace("-", MINUS);

/** Shows the state in the switches, which the address can change too. */
function syncFrontier() {
  for (const key of ["x", "y"]) frontier.axes[key].select.value = state[key];
  for (const [key, { input }] of Object.entries(frontier.flags)) input.checked = state[key];
  for (const key of ["x", "y"]) frontier.flags[`${key}other`].input.checked = isLog(key);
  for (const { key, inputs } of GROUPS) for (const [value, input] of inputs) input.checked = !state.off[key].has(value);
  frontier.flags.join.label.hidden = !Object.values(study.alike ?? {}).some((list) => list.length);
}

function naturalRanges(points) {
  const one = (key) => {
    if (!points.length) return [1, 10];
    const ends = state.intervals ? points.flatMap((point) => point[key].slice(1)).filter((end) => end !== null) : [];
    return rangeOf(
      points.map((point) => point[key][0]),
      ends,
      isLog(key),
    );
  };
  return { x: one("x"), y: one("y") };
}

const nothing = (text) => ({
  text,
  xref: "paper",
  yref: "paper",
  x: 0.5,
  y: 0.5,
  showarrow: false,
  font: { size: 15, color: themed("muted") },
});

/** Listens to zooms, once: Plotly keeps the listeners of a chart that it draws again. */
function listenFrontier() {
  if (frontier.listening) return;
  frontier.listening = true;
  frontier.chart.on("plotly_relayout", (event) => {
    if ("xaxis.range[0]" in event || "yaxis.range[0]" in event) draw(zoomed);
    else if ("xaxis.autorange" in event || "xaxis.range" in event) draw(unzoomed);
  });
}

/** Ticks that fit what the reader zoomed into. */
function zoomed() {
  const range = (key) => {
    const ends = frontier.chart.layout[`${key}axis`].range;
    return isLog(key) ? ends.map((end) => 10 ** end) : [...ends];
  };
  frontier.zoom = { x: range("x"), y: range("y") };
  drawFrontier();
}

function unzoomed() {
  frontier.zoom = null;
  drawFrontier();
}

function tellFrontier() {
  const { points, front } = frontier;
  const unmeasured = nodes.filter(({ node }) => !measured(state.x, node) || !measured(state.y, node)).length;
  frontier.status.textContent =
    `${points.length} of ${several(nodes.length, "node")} shown, ${front.length} on the front.` +
    (unmeasured
      ? ` ${several(unmeasured, "node")} ${unmeasured === 1 ? "lacks" : "lack"} one of the two measures.`
      : "");
  const [x, y] = [state.x, state.y].map((id) => measureOf.get(id).title);
  frontier.chart.setAttribute(
    "aria-label",
    `${y} against ${x}: ${frontier.status.textContent} The table below has the same points.`,
  );
  fill(frontier.take, front.length ? takeList(front) : null);
  const open = (name) => make("button", { type: "button", class: "link", onclick: () => goTo("node") }, name);
  const parts = state.a ? [make("span", {}, "Chosen: "), open(state.a)] : [];
  if (state.a && state.b) parts.push(make("span", {}, "after"), open(state.b));
  if (state.a && state.b) parts.push(quiet("compare the two", () => goTo("pair")));
  if (state.a || state.b) parts.push(quiet("clear", unchoose));
  frontier.chosen.replaceChildren(...parts);
}

/** The front's nodes with both values, from the best across. */
function takeList(front) {
  const [x, y] = [state.x, state.y].map((id) => withUnit(measureOf.get(id)));
  const rows = front
    .slice(0, MOST_TAKEN)
    .map((point) => [nodeButton(point.node.node), quantity(state.x, point.x[0]), interval(state.y, point.y)]);
  const more = front.length - rows.length;
  return [
    table(["on the front", x, y], rows, 1, "The nodes on the front"),
    more > 0 ? note(`And ${more} more, which the table of all points has.`) : null,
  ];
}

function frontierTable() {
  const [x, y] = [measureOf.get(state.x), measureOf.get(state.y)];
  const rows = frontier.points.map((point) => [
    nodeButton(point.node.node),
    quantity(x.id, point.x[0]),
    quantity(y.id, point.y[0]),
    sureness(y.id, point.y),
    frontier.front.includes(point) ? "yes" : "",
  ]);
  const ends = isCost(y.id) ? OF_REPEATS : "95% interval";
  return table(["node", withUnit(x), withUnit(y), ends, "on the front"], rows, 1, "The points of the chart");
}

const nodeButton = (name) =>
  make("button", { type: "button", class: "link", onclick: () => choose(name) }, breakable(name));

// ---------------------------------------------------------------------------------------------------------------
// Choosing nodes

/** Chooses a node; the one chosen before becomes the other of the pair. */
function choose(name) {
  if (name === state.a) return;
  change({ a: name, b: state.a || state.b }, drawFrontier, drawNode, drawPair);
  say(`Chosen: ${name}.`);
}

function unchoose() {
  change({ a: "", b: "" }, drawFrontier, drawNode, drawPair);
}

function goTo(id) {
  byId(id).scrollIntoView({ block: "start" });
  byId(id).focus({ preventScroll: true });
}
