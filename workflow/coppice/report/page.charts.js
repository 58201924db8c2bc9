// Charts: colours of the theme, axes and ticks that every chart shares

const probe = make("span", { class: "unseen", "aria-hidden": "true" });
const CONFIG = {
  displaylogo: false,
  showSendToCloud: false, // a study is nobody else's
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

/** The theme's colour of a name, let through by so much. */
const faint = (name, opacity) => themed(name).replace("rgb(", "rgba(").replace(")", `, ${opacity})`);
const widthOf = (element) => (printing ? 680 : Math.max(element.clientWidth, 260));

// What waits for its chart to come near the window.
const late = new Map();
const sight = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting || !late.has(target)) continue;
      late.get(target)();
      late.delete(target);
      sight.unobserve(target);
    }
  },
  { rootMargin: "300px" },
);

/** Draws a chart by Plotly when it is in sight or near; for paper at once. */
function plot(chart, traces, layout, config) {
  const now = () => Plotly.react(chart, traces, layout, config);
  sight.unobserve(chart);
  late.delete(chart);
  chart.style.minHeight = `${layout.height}px`;
  if (printing) return now();
  late.set(chart, now);
  sight.observe(chart);
}

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
