// The page of a study: reads the JSON of the element "study" and draws it with Plotly. Text of the study is set as
// text, never as HTML. What the reader chose is kept in the address after "#", so that a view can be sent on.
(() => {
  "use strict";

  // ---------------------------------------------------------------------------------------------------------------
  // The study

  const study = JSON.parse(document.getElementById("study").textContent);
  const nodes = [...study.nodes].sort((a, b) => byTree(a.node, b.node));
  const nodeOf = new Map(nodes.map((node) => [node.node, node]));
  const sizes = study.sizes ?? [];
  const qualities = study.qualities ?? [];
  const measureOf = new Map([...sizes, ...qualities].map((measure) => [measure.id, measure]));
  const pairs = study.pairs ?? {};
  const failures = study.failures ?? [];
  const recoveries = [...(study.recoveries ?? [])].sort((a, b) => byTree(a.node, b.node));
  const laws = study.laws ?? {};

  // Okabe and Ito's colours, which colour-blind readers tell apart; shapes tell the last step, lest colour be alone.
  const COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7a7a7a"];
  const SHAPES = {
    dense: "star",
    prune: "triangle-up",
    decompose: "square",
    quantize: "diamond",
    recover: "circle",
    compensate: "cross",
  };
  const RUN_SHAPES = ["circle", "square", "diamond", "triangle-up", "cross", "star"];
  const PATHS = {
    circle: "M7 2.2a4.8 4.8 0 1 0 .01 0Z",
    square: "M2.8 2.8H11.2V11.2H2.8Z",
    diamond: "M7 1.2 12.8 7 7 12.8 1.2 7Z",
    "triangle-up": "M7 1.8 12.6 11.6H1.4Z",
    cross: "M5.2 1.6H8.8V5.2H12.4V8.8H8.8V12.4H5.2V8.8H1.6V5.2H5.2Z",
    star: "M7 .8 8.6 5.1 13.2 5.3 9.6 8.1 10.8 12.6 7 10 3.2 12.6 4.4 8.1 .8 5.3 5.4 5.1Z",
  };
  const models = study.models.filter((model) => nodes.some((node) => node.model === model));
  const colorOf = new Map(models.map((model, place) => [model, COLORS[place % COLORS.length]]));

  /** Order of two nodes in the tree: by the steps of their paths, so that a parent stands before its children. */
  function byTree(first, second) {
    const a = first.split("/");
    const b = second.split("/");
    const [one, other] = [study.models.indexOf(a[0]), study.models.indexOf(b[0])];
    if (one !== other) return one - other;
    for (let place = 0; place < Math.min(a.length, b.length); place++) {
      if (a[place] !== b[place]) return a[place] < b[place] ? -1 : 1;
    }
    return a.length - b.length;
  }

  /** [value, low, high] of a node by a measure, or null; the ends are null where there is no interval. */
  function measured(id, name) {
    const found = study.values?.[id]?.[name];
    if (found) return found[0] === null ? null : found;
    const value = nodeOf.get(name)[id];
    return typeof value === "number" ? [value, null, null] : null;
  }

  const arrows = (composition) => composition.replaceAll(" > ", " \u2192 ");
  const costs = sizes.map(({ id }) => id).filter((id) => id.includes("/")); // a cost is named by its evaluation
  const mainMeasures = [...qualities, ...sizes.filter(({ id }) => !costs.includes(id))];
  const costMeasures = sizes.filter(({ id }) => costs.includes(id));
  const shapeOf = (node) => SHAPES[node.family] ?? "circle";
  const recovered = (node) => node.budget > 0;
  const shortName = (node) => node.recipe || `${node.model} (dense)`;
  const isQuality = (id) => qualities.some((quality) => quality.id === id);
  const better = (id) => measureOf.get(id).better; // "lower", "higher", or nothing where nobody knows
  const lowerIsBetter = (id) => better(id) !== "higher";

  /** Names of the nodes that are not told apart from this one by a quality. */
  function alikeOf(id, name) {
    const found = (study.alike?.[id] ?? []).filter(([a, b]) => a === name || b === name);
    return [...new Set(found.map(([a, b]) => (a === name ? b : a)))];
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Numbers and words

  const MINUS = "\u2212";

  /** A number to so many significant digits, without an exponent where it is readable so. */
  function shown(value, digits = 3) {
    if (value === null || value === undefined) return "";
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (size >= 1e6 || size < 1e-3)
      return value
        .toExponential(digits - 1)
        .replace("e+", "e")
        .replaceAll("-", MINUS);
    const text = size >= 10 ** (digits - 1) ? value.toFixed(0) : value.toPrecision(digits);
    return text.replace("-", MINUS);
  }

  /** A count in thousands, millions or billions: 1.4M. */
  function counted(value) {
    for (const [scale, letter] of [
      [1e9, "B"],
      [1e6, "M"],
      [1e3, "k"],
    ]) {
      if (Math.abs(value) >= scale) return `${Number((value / scale).toPrecision(3))}${letter}`;
    }
    return String(Number(value.toPrecision(3)));
  }

  const PREFIXES = [
    [1, ""],
    [1e-3, "m"],
    [1e-6, "\u00b5"],
    [1e-9, "n"],
  ];
  const isTime = (unit) => /^s(\/|$)/.test(unit);
  const ownUnit = (unit) => isTime(unit) || unit === "bytes"; // their values carry a unit with its prefix

  /** A value of a measure; times and bytes with their unit, so that they have few digits. */
  function quantity(id, value, format = shown) {
    const unit = measureOf.get(id).unit ?? "";
    if (unit === "bytes") return counted(value).replace(/[kMB]?$/, (letter) => ` ${letter === "B" ? "G" : letter}B`);
    if (unit === "parameters") return counted(value);
    if (!isTime(unit)) return format(value);
    const [scale, prefix] = PREFIXES.find(([size]) => Math.abs(value) >= size) ?? PREFIXES.at(-1);
    return `${format(value / scale)} ${prefix}${unit}`;
  }

  const signed = (value) => (value > 0 ? `+${shown(value)}` : shown(value));
  const several = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
  const withUnit = ({ title, unit }) => (unit && unit !== title && !ownUnit(unit) ? `${title}, ${unit}` : title);
  const withBetter = (id) => withUnit(measureOf.get(id)) + (better(id) ? `, ${better(id)} is better` : "");
  const chance = (p) => (p < 1e-4 ? "p < 0.0001" : p > 0.995 ? "p = 1" : `p = ${shown(p, 2)}`);

  /** Text for Plotly, which reads some tags. */
  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

  /** Value with its interval and unit, for one line. */
  function told(id, [value, low, high]) {
    const { title, unit } = measureOf.get(id);
    const ends = low === null || high === null ? "" : ` (${quantity(id, low)} to ${quantity(id, high)})`;
    return `${quantity(id, value)}${unit && unit !== title && !ownUnit(unit) ? ` ${unit}` : ""}${ends}`;
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Elements

  /** An element with attributes, listeners (onclick: ...) and children: elements or text. */
  function make(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (typeof value === "function") element.addEventListener(name.slice(2), value);
      else if (typeof value === "boolean") element.toggleAttribute(name, value);
      else if (value !== null) element.setAttribute(name, value);
    }
    element.append(...children.flat().filter((child) => child !== null));
    return element;
  }

  /** Puts these children, of which some may be lists or null, in place of an element's own. */
  const fill = (element, ...children) => element.replaceChildren(...children.flat().filter((child) => child !== null));

  const byId = (id) => document.getElementById(id);
  const heading = (id, text) => make("h2", { id: `${id}-title` }, text);
  const note = (text) => make("p", { class: "note" }, text);
  const empty = (text) => make("p", { class: "empty" }, text);

  /** A table; `rows` hold text or elements, and the first `texts` columns stand to the left. */
  function table(titles, rows, texts = 1, caption = null) {
    const cells = (row, tag) =>
      row.map((cell, place) =>
        make(tag, { class: place < texts ? "text" : null, scope: tag === "th" ? "col" : null }, cell ?? ""),
      );
    return make(
      "div",
      { class: "wide", tabindex: "0", role: "region", "aria-label": caption ?? titles.join(", ") },
      make(
        "table",
        {},
        make("thead", {}, make("tr", {}, cells(titles, "th"))),
        make(
          "tbody",
          {},
          rows.map((row) => make("tr", {}, cells(row, "td"))),
        ),
      ),
    );
  }

  /** A folded part whose content is made when it is opened, and again by `refresh` while it is open. */
  function folded(summary, content) {
    const body = make("div");
    const details = make("details", {}, make("summary", {}, summary), body);
    const refresh = () => details.open && body.replaceChildren(content());
    details.addEventListener("toggle", refresh);
    return { details, refresh };
  }

  /** A small drawing of a mark, as in the charts. */
  function mark(shape, color, filled) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    for (const [name, value] of [
      ["viewBox", "0 0 14 14"],
      ["class", "mark"],
      ["aria-hidden", "true"],
    ]) {
      svg.setAttribute(name, value);
    }
    path.setAttribute("d", PATHS[shape]);
    path.setAttribute("fill", filled ? color : "none");
    path.setAttribute("stroke", color);
    svg.append(path);
    return svg;
  }

  /** A labelled drop-down list; `groups`: [title, [[value, text], ...]]. */
  function chooser(label, groups, value, changed) {
    const option = ([key, text]) => make("option", { value: key }, text);
    const full = groups.filter(([, options]) => options.length);
    const children = full.map(([title, options]) =>
      full.length > 1 ? make("optgroup", { label: title }, options.map(option)) : options.map(option),
    );
    const select = make("select", { "aria-label": label, onchange: () => changed(select.value) }, children.flat());
    select.value = value;
    return { label: make("label", { class: "chooser" }, make("span", {}, label), select), select };
  }

  /** A switch that also Enter turns. */
  function checkbox(text, checked, changed, picture = null) {
    const input = make("input", {
      type: "checkbox",
      onchange: () => changed(input.checked),
      onkeydown: (event) => event.key === "Enter" && input.click(),
    });
    input.checked = checked;
    return { label: make("label", { class: "chip" }, input, picture, make("span", {}, text)), input };
  }

  /** A command or text with a button that copies it. */
  function copyable(text, what) {
    const code = make("code", {}, text);
    const button = make("button", { type: "button", class: "copy", "aria-label": `Copy ${what}` }, "Copy");
    button.addEventListener("click", async () => {
      await copy(text, code);
      button.textContent = "Copied";
      say(`Copied ${what}.`);
      setTimeout(() => {
        button.textContent = "Copy";
      }, 1500);
    });
    return make("div", { class: "command" }, make("pre", { tabindex: "0" }, code), button);
  }

  /** To the clipboard; a browser that refuses it to pages on disk copies the selected text. */
  async function copy(text, element) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      getSelection().selectAllChildren(element);
      document.execCommand("copy");
    }
  }

  const voice = make("p", { class: "unseen", role: "status", "aria-live": "polite" });
  const say = (text) => {
    voice.textContent = text;
  };

  // ---------------------------------------------------------------------------------------------------------------
  // What the reader chose, kept in the address

  const GROUPS = [
    { key: "model", title: "Model", of: (node) => node.model },
    { key: "family", title: "Last step", of: (node) => node.family },
    { key: "composition", title: "Composition", of: (node) => node.composition },
    { key: "budget", title: "Recovery tokens", of: (node) => String(node.budget) },
  ];
  const hasValues = (id) => nodes.some((node) => measured(id, node.node));
  const usable = {
    sizes: sizes.filter(({ id }) => hasValues(id)),
    qualities: qualities.filter(({ id }) => hasValues(id)),
  };
  const TEXTS = {
    x: (usable.sizes[0] ?? usable.qualities[0])?.id ?? "",
    y: (usable.qualities[0] ?? usable.sizes[1] ?? usable.sizes[0])?.id ?? "",
    a: "",
    b: "",
    quality: usable.qualities[0]?.id ?? "",
    column: "",
    law: Object.keys(laws)[0] ?? "",
    theme: "",
  };
  const FLAGS = { xother: false, yother: false, front: false, intervals: true, join: true, names: true, excess: false };
  const state = initial();

  function initial() {
    return { ...TEXTS, ...FLAGS, off: Object.fromEntries(GROUPS.map(({ key }) => [key, new Set()])), runs: null };
  }

  /** The state as text: only what differs from the beginning. */
  function hashOf() {
    const found = new URLSearchParams();
    for (const key of Object.keys(TEXTS)) if (state[key] !== TEXTS[key]) found.append(key, state[key]);
    for (const key of Object.keys(FLAGS)) if (state[key] !== FLAGS[key]) found.append(key, state[key] ? "1" : "0");
    for (const { key } of GROUPS) for (const value of state.off[key]) found.append(`no-${key}`, value);
    for (const run of state.runs ?? []) found.append("run", run);
    if (state.runs?.size === 0) found.append("run", "");
    return found.toString();
  }

  /** Takes the state from the address; what the study does not have is left out. */
  function readHash() {
    const found = new URLSearchParams(location.hash.slice(1));
    Object.assign(state, initial());
    for (const key of Object.keys(TEXTS)) if (found.has(key) && known(key, found.get(key))) state[key] = found.get(key);
    for (const key of Object.keys(FLAGS)) if (found.has(key)) state[key] = found.get(key) === "1";
    for (const { key } of GROUPS) state.off[key] = new Set(found.getAll(`no-${key}`));
    if (found.has("run")) state.runs = new Set(found.getAll("run").filter((run) => nodeOf.has(run)));
  }

  function known(key, value) {
    if (key === "x" || key === "y") return measureOf.has(value);
    if (key === "quality") return isQuality(value);
    if (key === "a" || key === "b") return nodeOf.has(value);
    return key !== "law" || value === "" || value in laws;
  }

  function writeHash() {
    const text = hashOf();
    history.replaceState(null, "", text ? `#${text}` : location.pathname + location.search);
  }

  // Several changes before the next frame are drawn once.
  const waiting = new Set();
  let asked = false;

  /** Draws these parts before the next frame. */
  function draw(...parts) {
    for (const part of parts) waiting.add(part);
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      const now = [...waiting];
      waiting.clear();
      asked = false;
      for (const part of now) part();
    });
  }

  let writing = 0;

  /** Changes the state and draws what shows it; the address, which browsers write slowly, follows after the frame. */
  function change(changes, ...parts) {
    Object.assign(state, changes);
    draw(...parts);
    clearTimeout(writing);
    writing = setTimeout(writeHash, 50);
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Charts: colours of the theme, axes and ticks that every chart shares

  const probe = make("span", { class: "unseen", "aria-hidden": "true" });
  const CONFIG = {
    displaylogo: false,
    responsive: false,
    doubleClick: "reset",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg", filename: study.study },
  };
  const touched = matchMedia("(pointer: coarse)");
  const printed = matchMedia("print");
  let printing = false;

  const palette = new Map();

  /** The theme's colour of a name, as Plotly reads it; asked of the browser once for a theme. */
  function themed(name) {
    if (!palette.has(name)) {
      probe.style.color = `var(--${name})`;
      palette.set(name, getComputedStyle(probe).color);
    }
    return palette.get(name);
  }

  const faint = (hex, opacity) => `rgba(${[1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16))}, ${opacity})`;
  const widthOf = (element) => (printing ? 680 : Math.max(element.clientWidth, 260));

  function baseLayout(width, height, margin) {
    return {
      width,
      height,
      margin,
      showlegend: false,
      hovermode: "closest",
      dragmode: touched.matches ? false : "zoom",
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: themed("ink") },
      hoverlabel: {
        bgcolor: themed("raised"),
        bordercolor: themed("line"),
        align: "left",
        font: { family: "system-ui, sans-serif", size: 13, color: themed("ink") },
      },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: themed("muted"), activecolor: themed("ink") },
    };
  }

  const axisTitle = (text) => ({ text: plain(text), standoff: 8, font: { size: 13, color: themed("muted") } });

  /** An axis with a range in its own values and readable ticks; `pixels` tells how many fit. */
  function axis(title, [low, high], log, pixels, format = counted) {
    const at = log ? Math.log10 : (value) => value;
    const ticks = ticksOf(low, high, log, Math.max(3, Math.round(pixels)));
    return {
      title: axisTitle(title),
      type: log ? "log" : "linear",
      range: [at(low), at(high)],
      tickvals: ticks,
      ticktext: ticks.map(format),
      gridcolor: themed("grid"),
      zeroline: false,
      showline: true,
      linecolor: themed("line"),
      ticks: "outside",
      tickcolor: themed("line"),
      ticklen: 4,
      tickfont: { size: 12, color: themed("muted") },
      fixedrange: touched.matches,
    };
  }

  /** Round numbers between two ends, about `most` of them. */
  function ticksOf(low, high, log, most) {
    if (log && high / low > 4) {
      const steps = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]];
      const found = steps.map((leads) => decades(low, high, leads)).filter((ticks) => ticks.length <= most + 1);
      const best = found.at(-1);
      if (best?.length > 2) return best;
    }
    const rough = (high - low) / most;
    const power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 5, 10].map((lead) => lead * power).find((size) => size >= rough);
    const first = Math.ceil(low / step - 1e-9);
    const last = Math.floor(high / step + 1e-9);
    return Array.from({ length: last - first + 1 }, (_, place) => Number(((first + place) * step).toPrecision(12)));
  }

  function decades(low, high, leads) {
    const found = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      for (const lead of leads) {
        const value = Number((lead * 10 ** power).toPrecision(3));
        if (value >= low && value <= high) found.push(value);
      }
    }
    return found;
  }

  /** The ends of values with room around them. Wide intervals do not press the points into a line. */
  function rangeOf(values, ends, log) {
    const inside = values.filter((value) => !log || value > 0);
    const [least, most] = [Math.min(...inside), Math.max(...inside)];
    const slack = log ? [least / 1.6, most * 1.6] : [least - (most - least) / 2, most + (most - least) / 2];
    const low = Math.max(Math.min(least, ...ends.filter((end) => !log || end > 0)), slack[0]);
    const high = Math.min(Math.max(most, ...ends), slack[1]);
    if (log) {
      const room = Math.max((high / low) ** 0.06, 1.03);
      return [low / room, high * room];
    }
    const room = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
    return [low - room, high + room];
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Size, latency and quality

  const NARROW = 832; // pixels: in a narrower window the switches are folded at first
  const frontier = { zoom: null };

  function buildFrontier() {
    const section = byId("frontier");
    section.append(heading("frontier", "Size, latency and quality"));
    if (!usable.sizes.length && !usable.qualities.length) {
      section.append(empty("Nothing was measured yet: no node has a size or a quality."));
      return;
    }
    const options = [
      ["Size", usable.sizes.filter(({ id }) => !costs.includes(id))],
      ["Measured cost", usable.sizes.filter(({ id, simulated }) => costs.includes(id) && !simulated)],
      ["Simulated cost", usable.sizes.filter(({ id, simulated }) => costs.includes(id) && simulated)],
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
      make("figure", {}, frontier.chart, make("figcaption", { class: "note" }, frontierCaption())),
      frontier.status,
      frontier.chosen,
      frontier.rows.details,
    );
  }

  function frontierCaption() {
    return (
      "Filled marks were recovered on their path, open ones were not. The dashed line is the front: no shown node is " +
      "better in both directions than those on it. Thin lines join neighbours whose difference is not told apart. " +
      "Bars are 95% intervals; of measured costs, the spread of the repeats. Click a node to read about it below, " +
      "and a second one to compare the two."
    );
  }

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
    const every = (text, on) =>
      make(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": `${group.title}: ${text}`,
          onclick: () => turn(group, values, on),
        },
        text,
      );
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
    if (group.key === "model") return mark("circle", colorOf.get(value), true);
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
    const width = widthOf(frontier.chart); // read first: after changes of the page it would have to be laid out again
    syncFrontier();
    const all = shownPoints();
    const front = frontOf(all);
    const points = state.front ? front : all;
    frontier.points = points;
    frontier.front = new Set(front.map(({ node }) => node.node));
    const margin = { l: width < 520 ? 52 : 66, r: 14, t: 14, b: 54 };
    const layout = baseLayout(width, Math.round(Math.min(560, Math.max(360, width * 0.56))), margin);
    if (!points.length) layout.annotations = [nothing("No node is shown: switch something on.")];
    const ranges = frontier.zoom ?? naturalRanges(points);
    layout.xaxis = axis(withBetter(state.x), ranges.x, isLog("x"), (width - margin.l) / 75, tickFormat(state.x));
    layout.yaxis = axis(withBetter(state.y), ranges.y, isLog("y"), layout.height / 50, tickFormat(state.y));
    const traces = [
      stairs(front, ranges),
      ...joins(points),
      ...models.flatMap((model) => modelTraces(points, model, ranges)),
      rings(points),
    ];
    if (state.names && points.length) layout.annotations = namesOf(points, front, ranges, layout);
    Plotly.react(frontier.chart, traces, layout, CONFIG);
    listenFrontier();
    tellFrontier();
    frontier.rows.refresh();
  }

  const tickFormat = (id) => (value) => quantity(id, value, counted).replace("-", MINUS);

  /** Shows the state in the switches, which the address can change too. */
  function syncFrontier() {
    for (const key of ["x", "y"]) frontier.axes[key].select.value = state[key];
    for (const [key, { input }] of Object.entries(frontier.flags)) input.checked = state[key];
    for (const key of ["x", "y"]) frontier.flags[`${key}other`].input.checked = isLog(key);
    for (const { key, inputs } of GROUPS)
      for (const [value, input] of inputs) input.checked = !state.off[key].has(value);
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

  /** The boundary of what the front reaches, as the corners of its steps. */
  function corners(front, ranges) {
    const [worstX, worstY] = [ranges.x[lowerIsBetter(state.x) ? 1 : 0], ranges.y[lowerIsBetter(state.y) ? 1 : 0]];
    const x = [];
    const y = [];
    front.forEach((point, place) => {
      x.push(point.x[0], point.x[0]);
      y.push(place ? front[place - 1].y[0] : worstY, point.y[0]);
    });
    if (front.length) {
      x.push(worstX);
      y.push(front.at(-1).y[0]);
    }
    return { x, y };
  }

  const stairs = (front, ranges) => ({
    ...corners(front, ranges),
    mode: "lines",
    hoverinfo: "skip",
    name: "front",
    line: { color: themed("muted"), width: 1.4, dash: "5px,4px" },
  });

  /** Thin lines between shown nodes that the quality upwards (or else across) does not tell apart. */
  function joins(points) {
    const id = isQuality(state.y) ? state.y : state.x;
    const by = new Map(points.map((point) => [point.node.node, point]));
    const found = state.join ? (study.alike?.[id] ?? []).filter(([a, b]) => by.has(a) && by.has(b)) : [];
    const ends = (key) => found.flatMap(([a, b]) => [by.get(a)[key][0], by.get(b)[key][0], null]);
    return [
      {
        x: ends("x"),
        y: ends("y"),
        mode: "lines",
        hoverinfo: "skip",
        name: "not told apart",
        line: { color: themed("join"), width: 1 },
      },
    ];
  }

  /** Of one model: its intervals, as one broken line because that is drawn fast, and its marks. */
  function modelTraces(points, model, ranges) {
    const own = points.filter(({ node }) => node.model === model);
    const color = colorOf.get(model);
    const bars = { x: [], y: [] };
    for (const { x, y } of state.intervals ? own : []) {
      const [down, up] = clipped(y, ranges.y);
      const [left, right] = clipped(x, ranges.x);
      if (y[1] !== null) (bars.x.push(x[0], x[0], null), bars.y.push(down, up, null));
      if (x[1] !== null) (bars.x.push(left, right, null), bars.y.push(y[0], y[0], null));
    }
    return [
      {
        ...bars,
        mode: "lines",
        hoverinfo: "skip",
        name: `${model}: intervals`,
        line: { color: faint(color, 0.6), width: 1.5 },
      },
      {
        x: own.map(({ x }) => x[0]),
        y: own.map(({ y }) => y[0]),
        customdata: own.map(({ node }) => node.node),
        mode: "markers",
        name: model,
        text: own.map(hoverText),
        hoverinfo: "text",
        marker: {
          color,
          size: 10,
          line: { width: 1.6, color },
          opacity: 1,
          symbol: own.map(({ node }) => shapeOf(node) + (recovered(node) ? "" : "-open")),
        },
      },
    ];
  }

  const clipped = ([, low, high], [bottom, top]) => [
    Math.max(low, Math.min(bottom, low > 0 ? low : bottom)),
    Math.min(high, top * 10),
  ];

  /** What is told of a point beside the pointer; kept until the axes change, because there may be many points. */
  function hoverText(point) {
    const axes = `${state.x} ${state.y}`;
    if (frontier.told?.axes !== axes) frontier.told = { axes, texts: new Map() };
    const { texts } = frontier.told;
    if (!texts.has(point.node)) texts.set(point.node, hoverLines(point));
    return texts.get(point.node);
  }

  function hoverLines({ node, x, y }) {
    const lines = [`<b>${plain(node.node)}</b>`];
    for (const [id, value] of [
      [state.x, x],
      [state.y, y],
    ])
      lines.push(`${plain(measureOf.get(id).title)}: ${told(id, value)}`);
    lines.push(plain(arrows(node.composition)) + (node.budget ? `, ${counted(node.budget)} recovery tokens` : ""));
    const alike = isQuality(state.y) ? alikeOf(state.y, node.node) : [];
    if (alike.length)
      lines.push(`not told apart from ${plain(alike.slice(0, 3).join(", "))}${alike.length > 3 ? " \u2026" : ""}`);
    return lines.join("<br>");
  }

  /** Rings around the chosen nodes. */
  function rings(points) {
    const found = points.filter(({ node }) => node.node === state.a || node.node === state.b);
    return {
      x: found.map(({ x }) => x[0]),
      y: found.map(({ y }) => y[0]),
      mode: "markers",
      hoverinfo: "skip",
      name: "chosen",
      marker: { symbol: "circle-open", size: 20, color: themed("ink"), line: { width: 1.6 } },
    };
  }

  /** Names beside the chosen nodes and the front's, where they hide nothing, as annotations of the chart. */
  function namesOf(points, front, ranges, layout) {
    const place = pixels(ranges, layout);
    const taken = [...points.map((point) => around(place(point), 6, 6)), ...risers(front, ranges, place)];
    const chosen = points.filter(({ node }) => node.node === state.a || node.node === state.b);
    return [...chosen, ...front.filter((one) => !chosen.includes(one))].flatMap((point) => {
      const text = shortName(point.node);
      const spot = roomFor(text, place(point), taken, layout);
      if (!spot) return [];
      const at = (key) => (isLog(key) ? Math.log10(point[key][0]) : point[key][0]);
      const [xanchor, yanchor, xshift, yshift] = spot;
      return [
        {
          x: at("x"),
          y: at("y"),
          text: plain(text),
          showarrow: false,
          xanchor,
          yanchor,
          xshift,
          yshift,
          borderpad: 0,
          font: { size: 12, color: themed("ink") },
          bgcolor: themed("veil"),
          captureevents: false,
        },
      ];
    });
  }

  /** The upright parts of the stairs, as narrow boxes that a name should not cross. */
  function risers(front, ranges, place) {
    const { x, y } = corners(front, ranges);
    return front.map((_, step) => {
      const [first, second] = [2 * step, 2 * step + 1].map((at) => place({ x: [x[at]], y: [y[at]] }));
      return [first[0] - 1, Math.min(first[1], second[1]), first[0] + 1, Math.max(first[1], second[1])];
    });
  }

  /** Where a point lies in the chart, in pixels from its left and upper edge. */
  function pixels(ranges, { width, height, margin }) {
    const along = (value, [low, high], log) =>
      log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    const [wide, tall] = [width - margin.l - margin.r, height - margin.t - margin.b];
    return ({ x, y }) => [along(x[0], ranges.x, isLog("x")) * wide, (1 - along(y[0], ranges.y, isLog("y"))) * tall];
  }

  const around = ([x, y], wide, tall) => [x - wide, y - tall, x + wide, y + tall];
  const overlap = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];

  // Where a name may stand beside its point: its anchors, and how many pixels it is moved right and up.
  const SPOTS = [
    ["left", "middle", 9, 0],
    ["right", "middle", -9, 0],
    ["center", "bottom", 0, 8],
    ["center", "top", 0, -8],
    ["left", "bottom", 6, 5],
    ["right", "top", -6, -5],
    ["right", "bottom", -6, 5],
    ["left", "top", 6, -5],
  ];

  /** The first spot beside a point where a name of this length hides nothing, which is then taken; or null. */
  function roomFor(text, [x, y], taken, { width, height, margin }) {
    const [wide, tall] = [text.length * 6.8, 14];
    const [right, bottom] = [width - margin.l - margin.r, height - margin.t - margin.b];
    for (const spot of SPOTS) {
      const left = x + spot[2] - { left: 0, center: wide / 2, right: wide }[spot[0]];
      const top = y - spot[3] - { top: 0, middle: tall / 2, bottom: tall }[spot[1]];
      const box = [left, top, left + wide, top + tall];
      const inside = box[0] > 0 && box[1] > 0 && box[2] < right && box[3] < bottom;
      if (inside && !taken.some((other) => overlap(box, other))) {
        taken.push(box);
        return spot;
      }
    }
    return null;
  }

  /** Listens to clicks and zooms, once: Plotly keeps the listeners of a chart that it draws again. */
  function listenFrontier() {
    if (frontier.listening) return;
    frontier.listening = true;
    frontier.chart.on("plotly_click", ({ points }) => points[0].customdata && choose(points[0].customdata));
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
    const best = points.filter(({ node }) => front.has(node.node)).length;
    const unmeasured = nodes.filter(({ node }) => !measured(state.x, node) || !measured(state.y, node)).length;
    frontier.status.textContent =
      `${points.length} of ${several(nodes.length, "node")} shown, ${best} on the front.` +
      (unmeasured
        ? ` ${several(unmeasured, "node")} ${unmeasured === 1 ? "lacks" : "lack"} one of the two measures.`
        : "");
    const [x, y] = [state.x, state.y].map((id) => measureOf.get(id).title);
    frontier.chart.setAttribute(
      "aria-label",
      `${y} against ${x}: ${frontier.status.textContent} The table below has the same points.`,
    );
    const open = (name) => make("button", { type: "button", class: "link", onclick: () => goTo("node") }, name);
    const action = (text, done) => make("button", { type: "button", class: "quiet", onclick: done }, text);
    const parts = state.a ? [make("span", {}, "Chosen: "), open(state.a)] : [];
    if (state.a && state.b)
      parts.push(
        make("span", {}, "after"),
        open(state.b),
        action("compare the two", () => goTo("pair")),
      );
    if (state.a || state.b) parts.push(action("clear", unchoose));
    frontier.chosen.replaceChildren(...parts);
  }

  function frontierTable() {
    const [x, y] = [measureOf.get(state.x), measureOf.get(state.y)];
    const ends = ([, low, high]) =>
      low === null || high === null ? "" : `${quantity(y.id, low)} to ${quantity(y.id, high)}`;
    const rows = frontier.points.map((point) => [
      nodeButton(point.node.node),
      quantity(x.id, point.x[0]),
      quantity(y.id, point.y[0]),
      ends(point.y),
      frontier.front.has(point.node.node) ? "yes" : "",
    ]);
    return table(
      ["node", withUnit(x), withUnit(y), "95% interval", "on the front"],
      rows,
      1,
      "The points of the chart",
    );
  }

  const nodeButton = (name) => make("button", { type: "button", class: "link", onclick: () => choose(name) }, name);

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

  // ---------------------------------------------------------------------------------------------------------------
  // One node

  const story = { active: 0, matching: nodes };

  function buildNode() {
    const section = byId("node");
    story.search = make("input", {
      type: "search",
      placeholder: "Find a node",
      "aria-label": "Find a node",
      oninput: listNodes,
      onkeydown: (event) => event.key === "ArrowDown" && (event.preventDefault(), story.list.focus()),
    });
    story.list = make("div", {
      class: "list",
      role: "listbox",
      tabindex: "0",
      id: "node-list",
      "aria-label": "Nodes",
      onkeydown: moveInList,
    });
    story.body = make("div", { class: "story" });
    section.append(
      heading("node", "One node"),
      make("div", { class: "columns" }, make("div", { class: "finder" }, story.search, story.list), story.body),
    );
    listNodes();
  }

  /** The list of nodes that the search lets through, indented as in the tree. */
  function listNodes() {
    const wanted = story.search.value.trim().toLowerCase();
    story.matching = nodes.filter(({ node }) => node.toLowerCase().includes(wanted));
    story.active = Math.max(
      0,
      story.matching.findIndex(({ node }) => node === state.a),
    );
    story.list.replaceChildren(
      ...story.matching.map((node, place) => {
        const text = wanted ? node.node : node.node.split("/").at(-1);
        return make(
          "div",
          {
            role: "option",
            id: `option-${place}`,
            style: wanted ? null : `--depth: ${node.depth}`,
            "aria-label": node.node,
            title: node.node,
            onclick: () => {
              story.active = place;
              choose(node.node);
            },
          },
          mark(shapeOf(node), colorOf.get(node.model), recovered(node)),
          make("span", {}, text),
        );
      }),
    );
    if (!story.matching.length) story.list.append(empty("No node has this in its name."));
    markInList();
  }

  function markInList() {
    [...story.list.querySelectorAll("[role=option]")].forEach((option, place) => {
      option.setAttribute("aria-selected", String(story.matching[place].node === state.a));
      option.classList.toggle("active", place === story.active);
    });
    const active = byId(`option-${story.active}`);
    active
      ? story.list.setAttribute("aria-activedescendant", active.id)
      : story.list.removeAttribute("aria-activedescendant");
    if (active) {
      // Scrolls the list alone, never the page.
      const [top, bottom] = [active.offsetTop, active.offsetTop + active.offsetHeight];
      if (top < story.list.scrollTop) story.list.scrollTop = top;
      if (bottom > story.list.scrollTop + story.list.clientHeight)
        story.list.scrollTop = bottom - story.list.clientHeight;
    }
  }

  function moveInList(event) {
    const last = story.matching.length - 1;
    const places = {
      ArrowDown: story.active + 1,
      ArrowUp: story.active - 1,
      PageDown: story.active + 10,
      PageUp: story.active - 10,
      Home: 0,
      End: last,
    };
    if (event.key in places) {
      story.active = Math.min(Math.max(places[event.key], 0), last);
      markInList();
    } else if (["Enter", " "].includes(event.key) && last >= 0) {
      choose(story.matching[story.active].node);
    } else {
      return;
    }
    event.preventDefault();
  }

  function drawNode() {
    const place = story.matching.findIndex(({ node }) => node === state.a);
    if (place >= 0) story.active = place;
    markInList();
    if (!state.a) {
      story.body.replaceChildren(
        empty(
          "Choose a node in the chart or in this list to read its story: how it was made, what it " +
            "stores, what it can do, and what happened in each layer.",
        ),
      );
      return;
    }
    const node = nodeOf.get(state.a);
    story.layers = make("div");
    fill(
      story.body,
      make("h3", {}, node.node),
      badges(node),
      pathOf(node),
      valuesOf(node),
      alikeSentence(node),
      make("h4", {}, "Make it again"),
      node.command ? copyable(node.command, `the command of ${node.node}`) : note("The study tells no command for it."),
      note(provenance(node)),
      story.layers,
    );
    drawLayers();
  }

  function badges(node) {
    const words = [arrows(node.composition), ...(node.marks ?? [])];
    if (node.budget) words.push(`${counted(node.budget)} recovery tokens`);
    return make(
      "p",
      { class: "badges" },
      [...new Set(words)].map((word) => make("span", {}, word)),
    );
  }

  function provenance(node) {
    const parts = [`seed ${node.seed}`];
    if (node.wall_seconds) parts.push(`made in ${duration(node.wall_seconds)}`);
    if (node.recovered_share !== null && node.recovered_share !== undefined) {
      parts.push(`recovery won back ${Math.round(100 * node.recovered_share)}% of the loss`);
    }
    if (node.fingerprint) parts.push(`fingerprint ${node.fingerprint.slice(0, 12)}`);
    const text = `${parts.join(", ")}.`;
    return text[0].toUpperCase() + text.slice(1);
  }

  const duration = (seconds) =>
    seconds < 90
      ? `${shown(seconds, 2)} s`
      : seconds < 5400
        ? `${shown(seconds / 60, 2)} min`
        : `${shown(seconds / 3600, 2)} h`;

  /** The steps from the dense model to the node, with their options. */
  function pathOf(node) {
    const color = colorOf.get(node.model);
    const start = make(
      "li",
      {},
      mark(SHAPES.dense, color, false),
      make("b", {}, node.model),
      make("small", {}, "dense model"),
    );
    const steps = (node.path ?? []).map(({ step, method, family, options }) => {
      const given = Object.entries(options ?? {}).filter(([, value]) => value !== null);
      const list = () =>
        make(
          "dl",
          {},
          given
            .map(([name, value]) => [
              make("dt", {}, name),
              make("dd", {}, typeof value === "object" ? JSON.stringify(value) : String(value)),
            ])
            .flat(),
        );
      return make(
        "li",
        {},
        mark(SHAPES[family] ?? "circle", color, family === "recover"),
        make("b", {}, step),
        make("small", {}, `${family}: ${method}`),
        given.length ? folded(several(given.length, "option"), list).details : null,
      );
    });
    return make("ol", { class: "path", "aria-label": "How it was made" }, start, steps);
  }

  /** Its qualities and sizes, and folded its costs, beside its dense model's. */
  function valuesOf(node) {
    const dense = node.depth && nodeOf.has(node.model) ? node.model : null;
    const row = (measure) => {
      const own = measured(measure.id, node.node);
      const before = dense && measured(measure.id, dense);
      return (
        own && [
          withUnit(measure),
          quantity(measure.id, own[0]),
          own[1] === null ? "" : `${quantity(measure.id, own[1])} to ${quantity(measure.id, own[2])}`,
          ...(dense
            ? [before ? quantity(measure.id, before[0]) : "", before?.[0] ? ratioTo(measure, own[0], before[0]) : ""]
            : []),
        ]
      );
    };
    const titles = ["measure", "value", "95% interval", ...(dense ? ["dense model", "change"] : [])];
    const [main, other] = [mainMeasures, costMeasures].map((measures) => measures.map(row).filter(Boolean));
    return [
      main.length ? table(titles, main, 1, `What ${node.node} is`) : empty("Nothing of this node was measured."),
      other.length
        ? folded(`Costs, measured and simulated (${other.length})`, () => table(titles, other)).details
        : null,
    ];
  }

  const ratioTo = (measure, value, before) =>
    measure.log || before > 2 ? `\u00d7${shown(value / before)}` : signed(value - before);

  function alikeSentence(node) {
    const found = qualities.flatMap(({ id, title }) => {
      const names = alikeOf(id, node.node);
      return names.length
        ? [
            make(
              "li",
              {},
              `${title}: `,
              names.flatMap((name, place) => [place ? ", " : "", nodeButton(name)]),
            ),
          ]
        : [];
    });
    return found.length ? make("div", {}, make("h4", {}, "Not told apart from"), make("ul", {}, found)) : null;
  }

  // ---------------------------------------------------------------------------------------------------------------
  // A node's layers

  const COLUMN_TITLES = {
    rank: "rank kept",
    sparsity: "sparsity, share of zeros",
    bits: "bits a weight",
    error: "relative error of the output",
  };
  const LAYER = /^(?:.*\.)?(?:layers|blocks|h)\.(\d+)(?:\.(.+))?$/;
  const columnTitle = (name) => COLUMN_TITLES[name] ?? name.replaceAll("_", " ");

  function drawLayers() {
    const found = study.layers?.[state.a];
    const columns = Object.keys(found?.columns ?? {});
    if (!columns.length) {
      story.layers.replaceChildren(
        make("h4", {}, "By layer"),
        note(
          nodeOf.get(state.a).depth
            ? "Nothing was recorded by layer for this node."
            : "The dense model's layers are as they were trained.",
        ),
      );
      return;
    }
    const varies = (name) => new Set(found.columns[name].filter((value) => value !== null)).size > 1;
    const column = columns.includes(state.column) ? state.column : (columns.find(varies) ?? columns[0]);
    const chart = make("div", {
      class: "chart",
      id: "layers-chart",
      role: "img",
      "aria-label": `${columnTitle(column)} by layer of ${state.a}; the table below has the same values`,
    });
    const picked = (name) => change({ column: name }, drawLayers);
    const rows = folded("These values as a table", () =>
      table(
        ["module", ...columns.map(columnTitle)],
        found.modules.map((module, place) => [module, ...columns.map((name) => shown(found.columns[name][place]))]),
      ),
    );
    const options = [["", columns.map((name) => [name, columnTitle(name)])]];
    fill(
      story.layers,
      make("h4", {}, `By layer: ${columnTitle(column)}`),
      columns.length > 1
        ? make("div", { class: "controls" }, chooser("What is shown", options, column, picked).label)
        : null,
      chart,
      rows.details,
    );
    const values = found.columns[column];
    const parts = found.modules
      .map((module) => LAYER.exec(module))
      .map((part) => part && [part[0], part[1], part[2] ?? "block"]);
    parts.every(Boolean) ? heatmap(chart, parts, values, column) : bars(chart, found.modules, values, column);
  }

  /** Kinds of modules by layers, coloured by the value, which stands in the cell where there is room. */
  function heatmap(chart, parts, values, column) {
    const depths = [...new Set(parts.map(([, depth]) => Number(depth)))].sort((a, b) => a - b);
    const kinds = [...new Set(parts.map(([, , kind]) => kind))].reverse();
    const z = kinds.map(() => depths.map(() => null));
    parts.forEach(([, depth, kind], place) => {
      z[kinds.indexOf(kind)][depths.indexOf(Number(depth))] = values[place];
    });
    const width = widthOf(chart);
    const [least, most] = [
      Math.min(...values.filter((one) => one !== null)),
      Math.max(...values.filter((one) => one !== null)),
    ];
    const flat = least === most;
    const scaled = !flat && kinds.length > 3;
    const margin = {
      l: Math.min(150, Math.max(...kinds.map((kind) => kind.length)) * 7 + 14),
      r: scaled ? 70 : 4,
      t: 8,
      b: 46,
    };
    const layout = baseLayout(width, kinds.length * 28 + margin.t + margin.b, margin);
    const bare = { showgrid: false, zeroline: false, tickfont: { size: 12, color: themed("muted") }, fixedrange: true };
    const roomy = (width - margin.l - margin.r) / depths.length > 44;
    layout.xaxis = { ...bare, type: "category", nticks: Math.floor(width / 40), title: axisTitle("layer") };
    layout.yaxis = { ...bare, type: "category" };
    Plotly.react(
      chart,
      [
        {
          type: "heatmap",
          z,
          x: depths.map(String),
          y: kinds,
          zmin: least,
          zmax: flat ? least + 1 : most,
          showscale: scaled,
          colorscale: flat
            ? [
                [0, themed("soft")],
                [1, themed("soft")],
              ]
            : "Cividis",
          xgap: 2,
          ygap: 2,
          hoverongaps: false,
          text: z.map((row) => row.map((value) => shown(value))),
          texttemplate: roomy ? "%{text}" : "",
          textfont: { size: 11 },
          hovertemplate: `layer %{x}, %{y}<br>${plain(columnTitle(column))}: %{text}<extra></extra>`,
          colorbar: { thickness: 10, outlinewidth: 0, tickfont: { size: 11, color: themed("muted") } },
        },
      ],
      layout,
      { ...CONFIG, displayModeBar: false },
    );
  }

  function bars(chart, modules, values, column) {
    const width = widthOf(chart);
    const margin = {
      l: Math.min(width * 0.5, Math.max(...modules.map((name) => name.length)) * 7 + 14),
      r: 16,
      t: 8,
      b: 46,
    };
    const layout = baseLayout(width, modules.length * 22 + margin.t + margin.b, margin);
    layout.xaxis = { title: axisTitle(columnTitle(column)), gridcolor: themed("grid"), zeroline: false };
    layout.yaxis = { type: "category", autorange: "reversed" };
    Plotly.react(
      chart,
      [
        {
          type: "bar",
          orientation: "h",
          x: values,
          y: modules,
          marker: { color: COLORS[0] },
          text: values.map((value) => shown(value)),
          hovertemplate: "%{y}: %{text}<extra></extra>",
        },
      ],
      layout,
      { ...CONFIG, displayModeBar: false },
    );
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Statistics of a pair, as coppice.uncertainty computes them

  const RESAMPLES = 2000;
  const RIGHT_OR_WRONG = "accuracy"; // the unit of items that are 1 where the answer is right, else 0

  /** Little-endian 32-bit floats from base64. */
  function floats(text) {
    const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: bytes.length / 4 }, (_, place) => view.getFloat32(4 * place, true));
  }

  /** Numbers in [0, 1) that a seed decides: Marsaglia's xorshift (Journal of Statistical Software 8, 2003). */
  function generator(seed) {
    let bits = Math.imul(seed + 1, 0x9e3779b1) || 1;
    return () => {
      bits ^= bits << 13;
      bits ^= bits >>> 17;
      bits ^= bits << 5;
      return (bits >>> 0) / 4294967296;
    };
  }

  /**
   * Test of sum d / sum w = 0 over items: difference, stderr, 95% interval and p of a paired bootstrap. p is never
   * below that of Student's t, nor below what random signs of the nonzero differences can tell.
   */
  function pairedBootstrap(differences, weights, seed) {
    const count = differences.length;
    const next = generator(seed);
    const samples = new Float64Array(RESAMPLES);
    for (let draw = 0; draw < RESAMPLES; draw++) {
      let [above, below] = [0, 0];
      for (let item = 0; item < count; item++) {
        const at = Math.floor(next() * count);
        above += differences[at];
        below += weights[at];
      }
      samples[draw] = above / below;
    }
    samples.sort();
    const crossing = Math.min(samples.filter((one) => one <= 0).length, samples.filter((one) => one >= 0).length);
    const tails = studentTails(differences, weights);
    const counted = (2 * (crossing + 1)) / (RESAMPLES + 1);
    const signs = 2 ** (1 - differences.filter((one) => one !== 0).length);
    const p = Math.min(1, Math.max(signs, crossing ? Math.max(counted, tails) : tails));
    const mean = samples.reduce((sum, one) => sum + one, 0) / RESAMPLES;
    const stderr = Math.sqrt(samples.reduce((sum, one) => sum + (one - mean) ** 2, 0) / (RESAMPLES - 1));
    return {
      difference: ratio(differences, weights),
      stderr,
      low: quantile(samples, 0.025),
      high: quantile(samples, 0.975),
      p,
      items: count,
    };
  }

  const total = (values) => values.reduce((sum, value) => sum + value, 0);
  const ratio = (above, below) => total(above) / total(below);

  /** The quantile of sorted values, between the two nearest in proportion. */
  function quantile(sorted, share) {
    const place = share * (sorted.length - 1);
    const below = Math.floor(place);
    return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
  }

  /** Two-sided p of Student's t of R = sum d / sum w, n - 1 degrees of freedom. */
  function studentTails(differences, weights) {
    const count = differences.length;
    const mean = ratio(differences, weights);
    if (count < 2 || mean === 0) return 1;
    const squares = differences.reduce((sum, one, item) => sum + (one - weights[item] * mean) ** 2, 0);
    if (squares === 0) return 0;
    const t = mean / (Math.sqrt((count / (count - 1)) * squares) / total(weights));
    return incompleteBeta((count - 1) / (count - 1 + t * t), (count - 1) / 2, 0.5);
  }

  /** The regularized incomplete beta function I_x(a, b), by its continued fraction (DLMF 8.17.22). */
  function incompleteBeta(x, a, b) {
    if (x >= 1) return 1;
    if (x > (a + 1) / (a + b + 2)) return 1 - incompleteBeta(1 - x, b, a);
    const front = Math.exp(logGamma(a + b) - logGamma(a) - logGamma(b) + a * Math.log(x) + b * Math.log1p(-x)) / a;
    let [upper, lower, fraction] = [1, 1 / (1 - ((a + b) * x) / (a + 1)), 1 / (1 - ((a + b) * x) / (a + 1))];
    for (let m = 1; m < 500; m++) {
      const even = (m * (b - m) * x) / ((a + 2 * m - 1) * (a + 2 * m));
      lower = 1 / (1 + even * lower);
      upper = 1 + even / upper;
      fraction *= upper * lower;
      const odd = (-(a + m) * (a + b + m) * x) / ((a + 2 * m) * (a + 2 * m + 1));
      lower = 1 / (1 + odd * lower);
      upper = 1 + odd / upper;
      fraction *= upper * lower;
      if (Math.abs(upper * lower - 1) < 1e-14) break;
    }
    return front * fraction;
  }

  /** ln Gamma(x) for x > 0: Stirling's series beyond 10, to which smaller x are raised. */
  function logGamma(x) {
    let [at, product] = [x, 1];
    while (at < 10) product *= at++;
    const square = at * at;
    const series = (1 / 12 - (1 / 360 - (1 / 1260 - (1 / 1680 - 1 / (1188 * square)) / square) / square) / square) / at;
    return (at - 0.5) * Math.log(at) - at + 0.5 * Math.log(2 * Math.PI) + series - Math.log(product);
  }

  /** McNemar's exact p: of the items that flipped, each had an even chance of either direction. */
  function mcnemar(lost, gained) {
    const [flips, fewer] = [lost + gained, Math.min(lost, gained)];
    let [term, sum] = [-flips * Math.LN2, 0];
    for (let drawn = 0; drawn <= fewer; drawn++) {
      if (drawn) term += Math.log((flips - drawn + 1) / drawn);
      sum += Math.exp(term);
    }
    return Math.min(1, 2 * sum);
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Two nodes

  const duel = { tests: new Map(), decoded: new Map() };

  function buildPair() {
    const section = byId("pair");
    section.append(heading("pair", "Two nodes side by side"));
    if (nodes.length < 2) {
      section.append(empty("The study has a single node so far."));
      return;
    }
    const groups = models.map((model) => [
      model,
      nodes.filter((node) => node.model === model).map(({ node }) => [node, node]),
    ]);
    const options = [["", [["", "Choose a node"]]], ...groups];
    const set = (key) => (value) => change({ [key]: value }, drawFrontier, drawNode, drawPair);
    duel.a = chooser("A", options, state.a, set("a"));
    duel.b = chooser("B", options, state.b, set("b"));
    duel.quality = chooser(
      "Measured by",
      [["", usable.qualities.map(({ id, title }) => [id, title])]],
      state.quality,
      (value) => change({ quality: value }, drawPair),
    );
    const swap = make(
      "button",
      {
        type: "button",
        class: "quiet",
        onclick: () => change({ a: state.b, b: state.a }, drawFrontier, drawNode, drawPair),
      },
      "swap",
    );
    duel.body = make("div", { "aria-live": "polite" });
    section.append(make("div", { class: "controls" }, duel.a.label, duel.b.label, swap, duel.quality.label), duel.body);
  }

  function drawPair() {
    if (!duel.body) return;
    duel.a.select.value = state.a;
    duel.b.select.value = state.b;
    duel.quality.select.value = state.quality;
    if (!state.a || !state.b || state.a === state.b) {
      duel.body.replaceChildren(
        empty(
          state.a && state.a === state.b
            ? "A and B are the same node."
            : "Choose two nodes: here, " +
                "or by two clicks in the chart. Their difference is tested over the items that both were measured on.",
        ),
      );
      return;
    }
    duel.chart = make("div", { class: "chart", id: "pair-chart", role: "img" });
    const test = state.quality ? testOf(state.quality, state.a, state.b) : null;
    fill(
      duel.body,
      test ? [verdict(test), flipsOf(test), duel.chart, note(testNote(test))] : empty(untested()),
      everyQuality(),
      sideBySide(),
    );
    if (test?.differences && !test.flips && test.differences.some((one) => one !== 0)) drawDifferences(test);
    else duel.chart.remove();
  }

  /** The items of a node by a quality, or null; decoded once. */
  function itemsOf(id, name) {
    const text = study.items?.[id]?.nodes?.[name];
    if (!text) return null;
    const key = `${id} ${name}`;
    if (!duel.decoded.has(key)) duel.decoded.set(key, floats(text));
    return duel.decoded.get(key);
  }

  /** The paired test of A minus B: from the items where both have them, else from the study's table, else null. */
  function testOf(id, a, b) {
    const key = JSON.stringify([id, a, b]);
    if (!duel.tests.has(key)) duel.tests.set(key, fromItems(id, a, b) ?? fromTable(id, a, b));
    return duel.tests.get(key);
  }

  function fromItems(id, a, b) {
    const [first, second] = [itemsOf(id, a), itemsOf(id, b)];
    if (!first || !second) return null;
    const { unit, weights } = study.items[id];
    const shared = [...first.keys()].filter((item) => !Number.isNaN(first[item]) && !Number.isNaN(second[item]));
    if (!shared.length) return null;
    const every = weights ? floats(weights) : null;
    const differences = Float64Array.from(shared, (item) => first[item] - second[item]);
    const tokens = Float64Array.from(shared, (item) => (every ? every[item] : 1));
    const test = pairedBootstrap(
      differences.map((one, item) => one * tokens[item]),
      tokens,
      study.seed ?? 0,
    );
    const flips = unit === RIGHT_OR_WRONG ? flipsBetween(shared, first, second) : null;
    return { id, a, b, ...test, differences, flips, source: "items", adjusted: rowOf(id, a, b)?.p_adjusted ?? null };
  }

  /** Counts of right and wrong answers, from B to A: lost ones B had right and A has wrong. */
  function flipsBetween(shared, first, second) {
    const count = (one, other) => shared.filter((item) => first[item] === one && second[item] === other).length;
    const [lost, gained] = [count(0, 1), count(1, 0)];
    return { both: count(1, 1), neither: count(0, 0), lost, gained, p: mcnemar(lost, gained) };
  }

  /** The row of the study's table for the pair, turned to A minus B. */
  function rowOf(id, a, b) {
    const rows = pairs[id] ?? [];
    const row = rows.find((one) => one.a === a && one.b === b);
    if (row) return row;
    const turned = rows.find((one) => one.a === b && one.b === a);
    return turned ? { ...turned, a, b, difference: -turned.difference, low: -turned.high, high: -turned.low } : null;
  }

  function fromTable(id, a, b) {
    const row = rowOf(id, a, b);
    return row && { id, ...row, source: "table", adjusted: row.p_adjusted, flips: null, differences: null };
  }

  /** Whether the nodes are told apart: by the study's adjusted test where it compared them, else by this test alone. */
  function apart(test) {
    const row = rowOf(test.id, test.a, test.b);
    return row ? row.distinguishable : test.p < 0.05;
  }

  function itemUnit(test) {
    const unit = study.items?.[test.id]?.unit ?? test.unit ?? measureOf.get(test.id).unit;
    return unit === "nats/token" ? "nats per token" : unit === RIGHT_OR_WRONG ? "percentage points" : (unit ?? "");
  }

  function verdict(test) {
    const winner = test.difference < 0 === lowerIsBetter(test.id) ? "A" : "B";
    const title = measureOf.get(test.id).title;
    const answer = !apart(test)
      ? "These two are not told apart"
      : better(test.id)
        ? `${winner} is better`
        : "These two differ";
    const scale = itemUnit(test) === "percentage points" ? 100 : 1;
    const [difference, low, high] = [test.difference, test.low, test.high].map((value) => signed(scale * value));
    return make(
      "div",
      { class: "verdict" },
      make("p", { class: "answer" }, `${answer} by ${title}.`),
      make(
        "p",
        {},
        `A minus B: ${difference} ${itemUnit(test)}`,
        ", 95% interval ",
        make("span", { class: "number" }, `${low} to ${high}`),
        `, ${chance(test.p)}`,
        test.items ? `, over ${several(test.items, "item")}` : "",
        ".",
        perplexityRatio(test),
      ),
    );
  }

  /** What a difference in nats a token means as a ratio of perplexities. */
  function perplexityRatio(test) {
    const { metric } = measureOf.get(test.id);
    if (!metric?.startsWith("perplexity") || !itemUnit(test).startsWith("nats")) return "";
    const [value, low, high] = [test.difference, test.low, test.high].map((one) => shown(Math.exp(one)));
    return ` That is ${value} times B's perplexity (${low} to ${high}).`;
  }

  function testNote(test) {
    const parts = [
      test.source === "items"
        ? `A paired bootstrap of the items, ${RESAMPLES} resamples, made here; p is never surer than a paired t test.`
        : "From the study's table of comparisons.",
    ];
    if (test.adjusted !== null && test.adjusted !== undefined) {
      parts.push(`Adjusted for all pairs that the study compares (Holm), p = ${shown(test.adjusted, 2)}.`);
    } else {
      parts.push("p is not adjusted for how many pairs a reader may try.");
    }
    return parts.join(" ");
  }

  function untested() {
    if (!usable.qualities.length) return "No quality was measured.";
    const left = study.items_left_out ?? "";
    const title = measureOf.get(state.quality).title;
    return (
      `There is no paired test of these two by ${title}: they share no items here, and no comparison was made.` +
      (left && ` ${left}`)
    );
  }

  /** McNemar's table of right and wrong answers. */
  function flipsOf({ flips }) {
    if (!flips) return null;
    return make(
      "div",
      { class: "flips" },
      table(
        ["", "B right", "B wrong"],
        [["A right", flips.both, flips.gained].map(String), ["A wrong", flips.lost, flips.neither].map(String)],
        1,
        "Right and wrong answers of both",
      ),
      note(
        `${several(flips.lost + flips.gained, "answer")} differ: ${flips.lost} only B has right, ` +
          `${flips.gained} only A. ` +
          `McNemar's exact ${chance(flips.p)}.`,
      ),
    );
  }

  /** How much the items differ, with zero and the mean's interval. */
  function drawDifferences(test) {
    const width = widthOf(duel.chart);
    const layout = baseLayout(width, 220, { l: 52, r: 14, t: 26, b: 50 });
    const title = `A minus B of an item, ${itemUnit(test)}`;
    layout.xaxis = {
      title: axisTitle(title),
      gridcolor: themed("grid"),
      zeroline: false,
      tickfont: { color: themed("muted") },
    };
    layout.yaxis = {
      title: axisTitle("items"),
      gridcolor: themed("grid"),
      zeroline: false,
      tickfont: { color: themed("muted") },
      fixedrange: true,
    };
    const line = (x, color, dash) => ({
      type: "line",
      x0: x,
      x1: x,
      yref: "paper",
      y0: 0,
      y1: 1,
      line: { color, width: 1.5, dash },
    });
    layout.shapes = [
      {
        type: "rect",
        x0: test.low,
        x1: test.high,
        yref: "paper",
        y0: 0,
        y1: 1,
        line: { width: 0 },
        fillcolor: faint(COLORS[1], 0.22),
      },
      line(0, themed("muted"), "4px,4px"),
      line(test.difference, COLORS[1], "solid"),
    ];
    layout.annotations = [
      {
        x: test.difference,
        yref: "paper",
        y: 1,
        yanchor: "bottom",
        text: "mean and its 95% interval",
        showarrow: false,
        font: { size: 12, color: themed("ink") },
      },
    ];
    layout.bargap = 0.06;
    Plotly.react(
      duel.chart,
      [
        {
          type: "histogram",
          x: [...test.differences],
          nbinsx: 40,
          marker: { color: faint(COLORS[0], 0.75) },
          hovertemplate: "%{x}: %{y} items<extra></extra>",
        },
      ],
      layout,
      { ...CONFIG, displayModeBar: false },
    );
    duel.chart.setAttribute(
      "aria-label",
      `Histogram of ${several(test.items, "item")}' differences, A minus B: mean ${shown(test.difference)}`,
    );
  }

  /** The paired test by every quality; the tests are computed when the part is opened. */
  function everyQuality() {
    const rows = () =>
      usable.qualities.map(({ id, title }) => {
        const test = testOf(id, state.a, state.b);
        if (!test) return [title, "", "", "", "no shared items"];
        return [
          title,
          signed(test.difference),
          `${signed(test.low)} to ${signed(test.high)}`,
          chance(test.p),
          apart(test) ? "told apart" : "not told apart",
        ];
      });
    return folded("The test by every quality", () =>
      table(["quality", "A minus B", "95% interval", "p", "verdict"], rows()),
    ).details;
  }

  function sideBySide() {
    const row = (title, of) => [title, of(nodeOf.get(state.a)), of(nodeOf.get(state.b))];
    const value = (id, name) => (measured(id, name) ? told(id, measured(id, name)) : "");
    const rowsOf = (measures) =>
      measures
        .filter(({ id }) => measured(id, state.a) || measured(id, state.b))
        .map((measure) => row(measure.title, ({ node }) => value(measure.id, node)));
    const rows = [
      row("composition", (node) => arrows(node.composition)),
      row("recovery tokens", (node) => (node.budget ? counted(node.budget) : "none")),
      ...rowsOf(mainMeasures),
    ];
    const titles = ["measure", `A: ${state.a}`, `B: ${state.b}`];
    const other = rowsOf(costMeasures);
    return make(
      "div",
      {},
      table(titles, rows, 1, "The two nodes side by side"),
      other.length
        ? folded(`Costs, measured and simulated (${other.length})`, () => table(titles, other)).details
        : null,
    );
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Recovery

  const MOST_RUNS = 8;
  const recovery = { inputs: new Map() };

  function buildRecovery() {
    const section = byId("recovery");
    section.append(heading("recovery", "Recovery"));
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
    recovery.rows = folded("These curves as a table", recoveryTable);
    const chips = recoveries.map((run) => {
      const chip = checkbox(
        run.node,
        true,
        (on) => turnRun(run.node, on),
        mark(runShape(run), colorOf.get(run.model), true),
      );
      chip.input.value = run.node;
      recovery.inputs.set(run.node, chip.input);
      return chip.label;
    });
    const every = (text, runs) =>
      make(
        "button",
        {
          type: "button",
          class: "quiet",
          "aria-label": `Runs: ${text}`,
          onclick: () => change({ runs: new Set(runs) }, drawRecovery),
        },
        text,
      );
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
          "Validation loss while a compressed model is trained again. " +
            "Large marks lie on the study's ladder of budgets. Lines are the law's loss with the band of 95% of its " +
            "bootstrap samples; dashed, on the shaded ground, it goes beyond what it was fitted to. " +
            "Thin horizontal lines: the dense models.",
        ),
      ),
      recovery.sentence,
      recovery.rows.details,
    );
  }

  /** The runs that are drawn: those chosen, else the first ones of each model. */
  function runsShown() {
    if (state.runs) return recoveries.filter(({ node }) => state.runs.has(node));
    if (recoveries.length <= MOST_RUNS) return recoveries;
    const share = Math.max(1, Math.floor(MOST_RUNS / new Set(recoveries.map(({ model }) => model)).size));
    const taken = new Map();
    return recoveries.filter(({ model }) => {
      taken.set(model, (taken.get(model) ?? 0) + 1);
      return taken.get(model) <= share;
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
    layout.xaxis = axis("recovery tokens", range.x, true, (width - margin.l) / 75);
    layout.yaxis = axis(
      state.excess ? "validation loss above the dense model's, nats per token" : "validation loss, nats per token",
      range.y,
      false,
      layout.height / 50,
      (value) => String(value).replace("-", MINUS),
    );
    Object.assign(layout, beyond(fits, range));
    if (!runs.length) layout.annotations = [nothing("No run is chosen.")];
    Plotly.react(
      recovery.chart,
      [...denseLines(runs, range), ...fits.flatMap(fitTraces), ...runs.map(runTrace)],
      layout,
      CONFIG,
    );
    recovery.chart.setAttribute(
      "aria-label",
      `Recovery curves of ${several(runs.length, "run")}; the table below has the same values.`,
    );
    recovery.rows.refresh();
  }

  const lossOf = (run, loss) => (loss === null ? null : loss - (state.excess ? run.dense_loss : 0));

  function recoveryRanges(fits) {
    if (!fits.length) return { x: [1e3, 1e6], y: [0, 1] };
    const tokens = fits.flatMap(({ run, fit }) => [...run.tokens.filter((one) => one > 0), ...(fit?.tokens ?? [])]);
    const losses = fits.flatMap(({ run, fit }) => [
      ...run.loss.filter((loss, place) => loss !== null && run.tokens[place] > 0).map((loss) => lossOf(run, loss)),
      ...(fit?.loss ?? []).filter((loss) => loss !== null).map((loss) => lossOf(run, loss)),
      lossOf(run, run.dense_loss),
    ]);
    return { x: rangeOf(tokens, [], true), y: rangeOf(losses, [], false) };
  }

  /** The ground beyond the last tokens that any shown law was fitted to. */
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
          fillcolor: themed("shade"),
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
          font: { size: 12, color: themed("muted") },
        },
      ],
    };
  }

  /** Thin lines at the loss of each dense model. */
  function denseLines(runs, range) {
    if (state.excess) return [];
    const found = new Map(runs.map(({ model, dense_loss }) => [`${model} ${dense_loss}`, { model, loss: dense_loss }]));
    return [...found.values()].map(({ model, loss }) => ({
      x: range.x,
      y: [loss, loss],
      mode: "lines",
      name: `${model}, dense`,
      text: `${plain(model)}, dense: ${shown(loss)}`,
      hoverinfo: "text",
      line: { color: faint(colorOf.get(model), 0.6), width: 1, dash: "2px,3px" },
    }));
  }

  /** The law's band, its line where it was fitted, and dashed its line beyond. */
  function fitTraces({ run, fit }) {
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
      line: { color, width: 1.6, dash },
    });
    const lines = [line(0, last, "solid"), line(Math.max(last - 1, 0), loss.length, "6px,4px")];
    if (!fit.low || !fit.high) return lines;
    return [
      {
        x: [...fit.tokens, ...[...fit.tokens].reverse()],
        y: [...fit.low.map((one) => lossOf(run, one)), ...fit.high.map((one) => lossOf(run, one)).reverse()],
        mode: "lines",
        fill: "toself",
        fillcolor: faint(color, 0.13),
        line: { width: 0 },
        hoverinfo: "skip",
        name: `${run.node}: band`,
      },
      ...lines,
    ];
  }

  function runTrace(run) {
    const kept = [...run.tokens.keys()].filter((place) => run.tokens[place] > 0 && run.loss[place] !== null);
    const color = colorOf.get(run.model);
    return {
      x: kept.map((place) => run.tokens[place]),
      y: kept.map((place) => lossOf(run, run.loss[place])),
      mode: "markers",
      name: run.node,
      text: kept.map((place) => `<b>${plain(run.node)}</b><br>${pointText(run, place)}`),
      hoverinfo: "text",
      marker: {
        color,
        opacity: 1,
        symbol: runShape(run),
        size: kept.map((place) => (run.budget?.[place] ? 10 : 5)),
        line: { width: 1, color: themed("paper") },
      },
    };
  }

  const pointText = (run, place) => `${counted(run.tokens[place])} tokens: ${shown(run.loss[place], 4)} nats per token`;

  function recoveryTable() {
    const rows = runsShown().flatMap((run) =>
      run.tokens.map((tokens, place) => [
        run.node,
        counted(tokens),
        shown(run.loss[place], 4),
        shown(run.dense_loss, 4),
        run.budget?.[place] ? "yes" : "",
      ]),
    );
    return table(["run", "tokens", "validation loss, nats per token", "dense model's", "on the ladder"], rows);
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Failures, and how to make it all again

  function buildFailures() {
    const section = byId("failures");
    section.append(heading("failures", "Failures"));
    if (!failures.length) {
      section.append(empty("Nothing failed."));
      return;
    }
    section.append(
      make(
        "ul",
        { class: "failures" },
        failures.map(({ node, stage, error, log }) =>
          make(
            "li",
            {},
            make("p", {}, make("b", {}, node || "the study"), ` failed in ${stage}`),
            make("p", { class: "error" }, error ?? ""),
            log ? make("p", { class: "note" }, "Log: ", make("code", {}, log)) : null,
          ),
        ),
      ),
    );
  }

  function buildReproduce() {
    const section = byId("reproduce");
    section.append(heading("reproduce", "Make it again"));
    const commands = study.reproduce ?? [];
    if (commands.length) section.append(copyable(commands.join("\n"), "the commands of the whole study"));
    const single = nodes.filter(({ command }) => command);
    if (single.length) {
      section.append(
        folded(`The command of each node (${single.length})`, () =>
          table(
            ["node", "command"],
            single.map(({ node, command }) => [node, copyable(command, `the command of ${node}`)]),
            2,
          ),
        ).details,
      );
    }
    if (study.config) section.append(folded("The study's config", () => copyable(study.config, "the config")).details);
    const versions = Object.entries(study.versions ?? {});
    if (versions.length)
      section.append(folded(`Versions (${versions.length})`, () => table(["package", "version"], versions, 2)).details);
    if (study.version) section.append(note(`Made by ${study.version}, seed ${study.seed ?? 0}.`));
  }

  // ---------------------------------------------------------------------------------------------------------------
  // Theme, print, width, and the beginning

  const dark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => !printing && (state.theme ? state.theme === "dark" : dark.matches);

  function applyTheme() {
    palette.clear();
    document.documentElement.style.colorScheme = isDark() ? "dark" : "light";
    byId("theme").setAttribute("aria-pressed", String(isDark()));
  }

  function drawAll() {
    applyTheme();
    drawFrontier();
    drawNode();
    drawPair();
    drawRecovery();
  }

  /** Charts for paper: light, and as wide as a page; drawn at once, because the print does not wait. */
  function preparePrint(on) {
    printing = on;
    drawAll();
  }

  function watchWidth() {
    let width = byId("interactive").clientWidth;
    new ResizeObserver(() => {
      if (byId("interactive").clientWidth === width || printing) return;
      width = byId("interactive").clientWidth;
      draw(drawAll);
    }).observe(byId("interactive"));
  }

  function buildNavigation() {
    const titles = [...document.querySelectorAll("#interactive > section, #tables")].map((section) => [
      section.id,
      section.querySelector("h2").textContent,
    ]);
    const links = titles.map(([id, text]) =>
      make(
        "a",
        {
          href: `#${id}`,
          onclick: (event) => {
            event.preventDefault();
            goTo(id);
          },
        },
        text,
      ),
    );
    const nav = document.querySelector("nav");
    nav.append(...links);
    document.querySelector(".skip").addEventListener("click", (event) => {
      event.preventDefault();
      goTo("frontier");
    });
  }

  function start() {
    document.body.append(voice, probe);
    for (const element of document.querySelectorAll("#interactive, .tools, nav")) element.hidden = false;
    readHash();
    for (const build of [
      buildFrontier,
      buildNode,
      buildPair,
      buildRecovery,
      buildFailures,
      buildReproduce,
      buildNavigation,
    ])
      build();
    drawAll();
    byId("theme").addEventListener("click", () => change({ theme: isDark() ? "light" : "dark" }, drawAll));
    byId("print").addEventListener("click", () => print());
    addEventListener("hashchange", () => {
      readHash();
      frontier.zoom = null;
      listNodes();
      drawAll();
    });
    addEventListener("beforeprint", () => preparePrint(true));
    addEventListener("afterprint", () => preparePrint(false));
    printed.addEventListener("change", (event) => preparePrint(event.matches));
    dark.addEventListener("change", () => draw(drawAll));
    watchWidth();
  }

  start();
})();
