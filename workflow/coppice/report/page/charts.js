// Charts: colours of the theme, and the layout and axes that every chart shares

const probe = make("span", { class: "unseen", "aria-hidden": "true" });
const CONFIG = {
  displaylogo: false,
  showSendToCloud: false, // a study may be confidential
  responsive: false,
  doubleClick: "reset",
  modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  toImageButtonOptions: { format: "svg", filename: study.study },
};
const touched = matchMedia("(pointer: coarse)");
const printed = matchMedia("print");
let printing = false;

const palette = new Map();

/** The theme's colour of a name, as Plotly reads it; computed once a theme. */
function themeColor(name) {
  if (!palette.has(name)) {
    probe.style.color = `var(--${name})`;
    palette.set(name, getComputedStyle(probe).color);
  }
  return palette.get(name);
}

/** The theme's colour of a name with an opacity. */
const faint = (name, opacity) => themeColor(name).replace("rgb(", "rgba(").replace(")", `, ${opacity})`);
const widthOf = (element) => (printing ? 680 : Math.max(element.clientWidth, 260));

// Charts that are drawn when they come near the window.
const pending = new Map();
const sight = new IntersectionObserver(
  (entries) => {
    for (const { isIntersecting, target } of entries) {
      if (!isIntersecting || !pending.has(target)) continue;
      pending.get(target)();
      pending.delete(target);
      sight.unobserve(target);
    }
  },
  { rootMargin: "300px" },
);

/** Draws a chart when it is in sight or near; at once for printing. */
function plot(chart, traces, layout, config) {
  const now = () => Plotly.react(chart, traces, layout, config);
  sight.unobserve(chart);
  pending.delete(chart);
  chart.style.minHeight = `${layout.height}px`;
  if (printing) return now();
  pending.set(chart, now);
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
    font: { family: "system-ui, sans-serif", size: 13, color: themeColor("ink") },
    hoverlabel: {
      bgcolor: themeColor("raised"),
      bordercolor: themeColor("line"),
      align: "left",
      font: { family: "system-ui, sans-serif", size: 13, color: themeColor("ink") },
    },
    modebar: { bgcolor: "rgba(0,0,0,0)", color: themeColor("muted"), activecolor: themeColor("ink") },
  };
}

const axisTitle = (text) => ({ text: plain(text), standoff: 8, font: { size: 13, color: themeColor("muted") } });

/** An axis with a range in its own values. */
function axis(title, [low, high], log, ticks = {}) {
  const at = log ? Math.log10 : (value) => value;
  return {
    title: axisTitle(title),
    type: log ? "log" : "linear",
    range: [at(low), at(high)],
    minorloglabels: "complete",
    nticks: high >= 10 * low && log ? Math.max(4, Math.floor(3.2 * Math.log10(high / low))) : 0, // 1, 2, 5 from 13-fold on
    ...ticks,
    gridcolor: themeColor("grid"),
    zeroline: false,
    showline: true,
    linecolor: themeColor("line"),
    ticks: "outside",
    tickcolor: themeColor("line"),
    ticklen: 4,
    tickfont: { size: 12, color: themeColor("muted") },
    fixedrange: touched.matches,
  };
}

/** A range around values with a margin. Intervals widen it by a bounded factor, lest they flatten the points. */
function rangeOf(values, ends, log) {
  const inside = values.filter((value) => !log || value > 0);
  const [least, most] = [Math.min(...inside), Math.max(...inside)];
  const slack = log ? [least / 1.6, most * 1.6] : [least - (most - least) / 2, most + (most - least) / 2];
  const low = Math.max(Math.min(least, ...ends.filter((end) => !log || end > 0)), slack[0]);
  const high = Math.min(Math.max(most, ...ends), slack[1]);
  if (log) {
    const margin = Math.max((high / low) ** 0.06, 1.03);
    return [low / margin, high * margin];
  }
  const margin = 0.06 * (high - low) || 0.1 * Math.abs(high) || 1;
  return [low - margin, high + margin];
}
