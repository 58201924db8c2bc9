// Size, latency and quality

const NARROW = 832; // pixels: in a narrower window the switches are folded at first
const MOST_LISTED = 12; // nodes of the Pareto front in the table under the chart
const RING = 20; // pixels: diameter of the ring around a chosen node
const frontier = {};

function buildFrontier() {
  const section = byId("frontier");
  section.append(heading("frontier", "Size-quality frontier"));
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
  const axisChooser = (key, text) =>
    chooser(text, options, state[key], (value) => change({ [key]: value }, drawFrontier));
  const flag = (key, text) => checkbox(text, state[key], (on) => change({ [key]: on }, drawFrontier));
  const scale = (key, text) =>
    checkbox(text, isLog(key), (on) =>
      change({ [`${key}other`]: on !== Boolean(measureOf.get(state[key]).log) }, drawFrontier),
    );
  frontier.axes = { x: axisChooser("x", "Horizontal axis"), y: axisChooser("y", "Vertical axis") };
  frontier.flags = {
    front: flag("front", "Pareto front only"),
    intervals: flag("intervals", "95% intervals"),
    join: flag("join", "Join nodes that do not differ significantly"),
    names: flag("names", "Names"),
    xother: scale("x", "Log horizontal axis"),
    yother: scale("y", "Log vertical axis"),
  };
  frontier.chart = make("div", { class: "chart", id: "frontier-chart", role: "img" });
  frontier.listed = make("div", { class: "listed" });
  frontier.status = make("p", { class: "status", role: "status", "aria-live": "polite" });
  frontier.chosen = make("div", { class: "chosen" });
  frontier.rows = foldable("These points as a table", frontierTable);
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
      make("summary", {}, "Show and hide nodes"),
      make("div", { class: "switches" }, GROUPS.map(switches)),
    ),
    make("figure", {}, frontier.chart, make("figcaption", { class: "note" }, FRONTIER_CAPTION)),
    frontier.status,
    frontier.listed,
    frontier.chosen,
    frontier.rows.details,
  );
}

const FRONTIER_CAPTION =
  "Colour: model. Shape: last step, filled if the node was recovered on its path. Dashed: the Pareto front of the " +
  "shown nodes. Thin lines join neighbours in rank that are not significantly different. Bars: 95% intervals; for measured " +
  "costs, half the interquartile range of the repeats on either side. Click a node to see its details below, and a " +
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
        : formatCount(Number(value));

function switchMark(group, value) {
  if (group.key === "model") return mark("circle", inColor(value), true);
  return group.key === "family" ? mark(SHAPES[value] ?? "circle", "currentColor", false) : null;
}

function turn(group, values, on) {
  for (const value of values) on ? state.off[group.key].delete(value) : state.off[group.key].add(value);
  change({}, drawFrontier);
}

/** The nodes that are switched on and have both measures: [{node, x, y}], with values and ends. */
function shownPoints() {
  return nodes
    .filter((node) => GROUPS.every(({ key, of }) => !state.off[key].has(of(node))))
    .map((node) => ({ node, x: valueOf(state.x, node.node), y: valueOf(state.y, node.node) }))
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

/** Whether an axis is logarithmic: as its measure says, unless the reader switched it. */
const isLog = (key) => Boolean(measureOf.get(state[key]).log) !== state[`${key}other`];

function drawFrontier() {
  if (!frontier.chart) return;
  const width = widthOf(frontier.chart); // read before the page changes, which would force another layout
  syncFrontier();
  const all = shownPoints();
  frontier.front = frontOf(all);
  frontier.points = state.front ? frontier.front : all;
  const ranges = naturalRanges(frontier.points);
  const layout = frontierLayout(width, ranges);
  Plotly.react(frontier.chart, frontierTraces(ranges, layout), layout, CONFIG);
  if (!frontier.listening) frontier.chart.on("plotly_click", ({ points: [point] }) => choose(point.customdata));
  frontier.listening = true;
  describeFrontier();
  frontier.rows.refresh();
}

function frontierLayout(width, ranges) {
  const margin = { l: width < 520 ? 52 : 66, r: 14, t: 14, b: 54 };
  const layout = baseLayout(width, Math.round(Math.min(560, Math.max(360, width * 0.56))), margin);
  if (!frontier.points.length) layout.annotations = [nothing("No node is shown: switch some on.")];
  layout.xaxis = axis(withBetter(state.x), ranges.x, isLog("x"), unitTicks(state.x));
  layout.yaxis = axis(withBetter(state.y), ranges.y, isLog("y"), unitTicks(state.y));
  layout.uirevision = JSON.stringify(ranges); // a zoom stays until other points are shown
  return layout;
}

/** Ticks of times and bytes carry their unit with its prefix: 20ms, 5MB. */
function unitTicks(id) {
  const { unit } = measureOf.get(id);
  if (unit === "bytes") return { tickformat: "~s", ticksuffix: "B" };
  return isTime(unit ?? "") ? { tickformat: "~s", ticksuffix: unit } : {};
}

/** Below: the front and the pairs that do not differ; the points, one trace a model; above: names and rings. */
function frontierTraces(ranges, layout) {
  const { points, front } = frontier;
  const [worstX, worstY] = [ranges.x[lowerIsBetter(state.x) ? 1 : 0], ranges.y[lowerIsBetter(state.y) ? 1 : 0]];
  const [frontX, frontY] = [front.map(({ x }) => x[0]), front.map(({ y }) => y[0])];
  const stairs = front.length ? [[frontX[0], ...frontX, worstX], [worstY, ...frontY, frontY.at(-1)]] : [[], []];
  const chosen = points.filter(({ node }) => [state.a, state.b].includes(node.node));
  return [
    { ...line(...joins(points), { color: themeColor("join"), width: 1 }), name: "not significantly different" },
    {
      ...line(...stairs, { color: themeColor("muted"), width: 1.4, dash: "5px,4px", shape: "hv" }),
      name: "Pareto front",
    },
    ...models.map((model) => pointsTrace(model, points)),
    ...(state.names ? [namesTrace(chosen, frontier, ranges, layout)] : []),
    {
      x: chosen.map(({ x }) => x[0]),
      y: chosen.map(({ y }) => y[0]),
      mode: "markers",
      name: "chosen",
      hoverinfo: "skip",
      marker: { symbol: "circle-open", size: RING, opacity: 1, color: themeColor("ink"), line: { width: 1.6 } },
    },
  ];
}

const line = (x, y, settings) => ({ x, y, mode: "lines", hoverinfo: "skip", line: settings });

function pointsTrace(model, points) {
  const own = points.filter(({ node }) => node.model === model);
  const color = themeColor(colorOf.get(model));
  return {
    x: own.map(({ x }) => x[0]),
    y: own.map(({ y }) => y[0]),
    error_x: errorBars(own, "x", color),
    error_y: errorBars(own, "y", color),
    mode: "markers",
    name: model,
    customdata: own.map(({ node }) => node.node),
    text: own.map(nodeText),
    hoverinfo: "text",
    marker: {
      color,
      opacity: 1,
      symbol: own.map(({ node }) => shapeOf(node) + (isRecovered(node) ? "" : "-open")),
      size: own.map(({ node }) => (shapeOf(node) === "star" ? 13 : 10)),
      line: { width: 1.5, color },
    },
  };
}

/** The intervals of points along one axis, as lengths from the values. */
const errorBars = (points, key, color) => ({
  visible: state.intervals && points.some(({ [key]: [, low] }) => low !== null),
  symmetric: false,
  array: points.map(({ [key]: [value, , high] }) => (high === null ? 0 : high - value)),
  arrayminus: points.map(({ [key]: [value, low] }) => (low === null ? 0 : value - low)),
  color,
  thickness: 1.2,
  width: 0,
});

/** Line segments between shown nodes that do not differ significantly in the vertical axis' quality,
 * or else in the horizontal axis'. */
function joins(points) {
  const spots = new Map(points.map((point) => [point.node.node, point]));
  const id = isQuality(state.y) ? state.y : state.x;
  const joined = state.join ? (study.alike?.[id] ?? []).filter(([a, b]) => spots.has(a) && spots.has(b)) : [];
  const along = (key) => joined.flatMap(([a, b]) => [spots.get(a)[key][0], spots.get(b)[key][0], null]);
  return [along("x"), along("y")];
}

/** Names of the chosen nodes and those of the front, each where it covers neither another name nor a point. */
function namesTrace(chosen, { points, front }, ranges, { width, height, margin }) {
  const along = (value, [low, high], log) =>
    log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
  const spotOf = ({ x, y }) => [
    along(x[0], ranges.x, isLog("x")) * (width - margin.l - margin.r),
    (1 - along(y[0], ranges.y, isLog("y"))) * (height - margin.t - margin.b),
  ];
  const named = [...new Set([...chosen, ...front])];
  const taken = points.map(spotOf).map(([x, y]) => [x - 6, y - 6, x + 6, y + 6]);
  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
  const placed = named.flatMap((point) => {
    const [x, y] = spotOf(point);
    const wide = shortName(point.node).length * 6.8;
    const boxes = [
      ["top right", [x + 5, y - 20, x + 5 + wide, y - 7]],
      ["bottom left", [x - 5 - wide, y + 7, x - 5, y + 20]],
      ["middle right", [x + 8, y - 7, x + 8 + wide, y + 7]],
      ["middle left", [x - 8 - wide, y - 7, x - 8, y + 7]],
      ["bottom center", [x - wide / 2, y + 7, x + wide / 2, y + 20]],
    ];
    const inside = ([left, , right]) => left > 0 && right < width - margin.l - margin.r;
    const spot = boxes.find(([, box]) => inside(box) && !taken.some((other) => overlap(box, other)));
    if (!spot) return [];
    taken.push(spot[1]);
    return [{ point, position: spot[0] }];
  });
  return {
    x: placed.map(({ point }) => point.x[0]),
    y: placed.map(({ point }) => point.y[0]),
    mode: "markers+text", // unseen markers keep the text away from the points
    marker: { size: placed.map(({ point }) => (chosen.includes(point) ? RING : 10)), opacity: 0 },
    name: "names",
    hoverinfo: "skip",
    text: placed.map(({ point }) => plain(shortName(point.node))),
    textposition: placed.map(({ position }) => position),
    textfont: { size: 12, color: themeColor("ink") },
  };
}

/** What is shown when the pointer is over a node. */
function nodeText({ node, x, y }) {
  const alike = isQuality(state.y) ? alikeOf(state.y, node.node) : [];
  const lines = [
    `${measureOf.get(state.x).title}: ${formatSentence(state.x, x)}`,
    `${measureOf.get(state.y).title}: ${formatSentence(state.y, y)}`,
    arrows(node.composition) + (node.budget ? `, ${formatCount(node.budget)} recovery tokens` : ""),
  ];
  if (alike.length)
    lines.push(
      `not significantly different from ${alike.slice(0, 3).join(", ")}${alike.length > 3 ? " \u2026" : ""}`,
    );
  return `<b>${plain(node.node)}</b><br>${lines.map(plain).join("<br>")}`;
}

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
  font: { size: 15, color: themeColor("muted") },
});

function describeFrontier() {
  const { points, front } = frontier;
  const unmeasured = nodes.filter(({ node }) => !valueOf(state.x, node) || !valueOf(state.y, node)).length;
  frontier.status.textContent =
    `${points.length} of ${plural(nodes.length, "node")} shown, ${front.length} on the Pareto front.` +
    (unmeasured
      ? ` ${plural(unmeasured, "node")} ${unmeasured === 1 ? "lacks" : "lack"} one of the two measures.`
      : "");
  const [x, y] = [state.x, state.y].map((id) => measureOf.get(id).title);
  frontier.chart.setAttribute(
    "aria-label",
    `${y} against ${x}: ${frontier.status.textContent} The table below has the same points.`,
  );
  fill(frontier.listed, front.length ? frontList(front) : null);
  const open = (name) => make("button", { type: "button", class: "link", onclick: () => goTo("node") }, name);
  const parts = state.a ? [make("span", {}, "Chosen: "), open(state.a)] : [];
  if (state.a && state.b) parts.push(make("span", {}, "and"), open(state.b));
  if (state.a && state.b) parts.push(quiet("compare the two nodes", () => goTo("pair")));
  if (state.a || state.b) parts.push(quiet("clear", unchoose));
  frontier.chosen.replaceChildren(...parts);
}

/** The nodes of the front with both values, from the best on the horizontal axis. */
function frontList(front) {
  const [x, y] = [state.x, state.y].map((id) => withUnit(measureOf.get(id)));
  const rows = front
    .slice(0, MOST_LISTED)
    .map((point) => [nodeButton(point.node.node), formatValue(state.x, point.x[0]), interval(state.y, point.y)]);
  const more = front.length - rows.length;
  return [
    table(["on the Pareto front", x, y], rows, 1, "The nodes on the Pareto front"),
    more > 0 ? note(`${more} more are in the table of all points.`) : null,
  ];
}

function frontierTable() {
  const [x, y] = [measureOf.get(state.x), measureOf.get(state.y)];
  const rows = frontier.points.map((point) => [
    nodeButton(point.node.node),
    formatValue(x.id, point.x[0]),
    formatValue(y.id, point.y[0]),
    uncertainty(y.id, point.y),
    frontier.front.includes(point) ? "yes" : "",
  ]);
  const ends = isCost(y.id) ? OF_REPEATS : "95% interval";
  return table(["node", withUnit(x), withUnit(y), ends, "on the Pareto front"], rows, 1, "The points of the chart");
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
