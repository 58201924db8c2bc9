// Numbers and words

const MINUS = "\u2212";

/** A number with significant digits, without an exponent between 0.001 and a million (coppice.formatting.number). */
function formatNumber(value, digits = 3) {
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

/** A count in thousands, millions or billions: 1.4M (coppice.formatting.human_count). */
function formatCount(value) {
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
const ownUnit = (unit) => isTime(unit) || unit === "bytes"; // their values are printed with a prefixed unit

/** A value of a measure; times and bytes with a prefixed unit. */
function formatValue(id, value) {
  const unit = measureOf.get(id).unit ?? "";
  if (unit === "bytes") return formatCount(value).replace(/[kMB]?$/, (letter) => ` ${letter === "B" ? "G" : letter}B`);
  if (unit === "parameters") return formatCount(value);
  if (!isTime(unit)) return formatNumber(value);
  const [scale, prefix] = PREFIXES.find(([size]) => Math.abs(value) >= size) ?? PREFIXES.at(-1);
  return `${formatNumber(value / scale)} ${prefix}${unit}`;
}

const formatSigned = (value) => (value > 0 ? `+${formatNumber(value)}` : formatNumber(value));
const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
const withUnit = ({ title, unit }) => (unit && unit !== title && !ownUnit(unit) ? `${title}, ${unit}` : title);
const withBetter = (id) => withUnit(measureOf.get(id)) + (better(id) ? `, ${better(id)} is better` : "");
const formatP = (p) => (p < 1e-4 ? "p < 0.0001" : p > 0.995 ? "p = 1" : `p = ${formatNumber(p, 2)}`);

/** Text for Plotly, which interprets some tags. */
const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");

const OF_REPEATS = "half the interquartile range of the repeats"; // the meaning of a measured cost's ends

/** The uncertainty of a value: its 95% interval or, for a measured cost, half the interquartile range. */
function uncertainty(id, [, low, high]) {
  if (low === null || high === null) return "";
  if (isCost(id)) return `\u00b1\u00a0${formatValue(id, (high - low) / 2)}`;
  return `${formatValue(id, low)} to ${formatValue(id, high)}`;
}

/** The uncertainty as it follows a value: an interval in brackets. */
function suffix(id, value) {
  const text = uncertainty(id, value);
  return !text ? "" : isCost(id) ? ` ${text}` : ` (${text})`;
}

/** A value with its interval, for one cell of a table. */
const interval = (id, value) => formatValue(id, value[0]) + suffix(id, value);

/** A value with its unit and interval, for a sentence. */
function formatSentence(id, value) {
  const { title, unit } = measureOf.get(id);
  const after = unit && unit !== title && !ownUnit(unit) ? ` ${unit}` : "";
  return isCost(id) ? interval(id, value) + after : formatValue(id, value[0]) + after + suffix(id, value);
}
