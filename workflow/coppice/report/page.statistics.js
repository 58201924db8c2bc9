// Statistics of a pair, as coppice.uncertainty computes them

const RESAMPLES = 2000;
const SLICE = 12; // milliseconds of a slice of resampling: less than a frame
const RIGHT_OR_WRONG = "accuracy"; // the unit of items that are 1 where the answer is right, else 0

/** Little-endian 32-bit floats from base64. */
function floats(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const view = new DataView(bytes.buffer);
  return Float64Array.from({ length: bytes.length / 4 }, (_, place) => view.getFloat32(4 * place, true));
}

/**
 * Resampled ratios sum d / sum w, sorted, or null where `wanted` says no more. Made in slices, so that the page stays
 * alive. The random numbers are Marsaglia's xorshift (Journal of Statistical Software 8, 2003), which a seed decides.
 */
async function resampled(differences, weights, seed, wanted) {
  const [count, samples] = [differences.length, new Float64Array(RESAMPLES)];
  let bits = Math.imul(seed + 1, 0x9e3779b1) || 1;
  for (let draw = 0, start = performance.now(); draw < RESAMPLES; draw++) {
    let [above, below] = [0, 0];
    for (let item = 0; item < count; item++) {
      bits ^= bits << 13;
      bits ^= bits >>> 17;
      bits ^= bits << 5;
      const at = Math.floor(((bits >>> 0) / 4294967296) * count);
      above += differences[at];
      below += weights[at];
    }
    samples[draw] = above / below;
    if (performance.now() - start < SLICE) continue;
    await new Promise((done) => setTimeout(done));
    if (!wanted()) return null;
    start = performance.now();
  }
  return samples.sort();
}

/**
 * Test of sum d / sum w = 0 over items: difference, stderr, 95% interval and p of a paired bootstrap. p is never
 * below that of Student's t, nor below what random signs of the nonzero differences can tell.
 */
async function pairedBootstrap(differences, weights, seed, wanted) {
  const samples = await resampled(differences, weights, seed, wanted);
  if (!samples) return null;
  const crossing = Math.min(samples.filter((one) => one <= 0).length, samples.filter((one) => one >= 0).length);
  const tails = studentTails(differences, weights);
  const counted = (2 * (crossing + 1)) / (RESAMPLES + 1);
  const signs = 2 ** (1 - differences.filter((one) => one !== 0).length);
  const p = Math.min(1, Math.max(signs, crossing ? Math.max(counted, tails) : tails));
  const [low, high] = [quantile(samples, 0.025), quantile(samples, 0.975)];
  return { difference: ratio(differences, weights), low, high, p, items: differences.length };
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
