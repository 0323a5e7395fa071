// What the sites of several engines, and the phases of one site, add up to. Extrema never average.

const PHASES = ["first", "prefill", "decode"];
export { PHASES };

const fold = (choose) => (a, b) => (a === null || a === undefined ? b ?? null : b === null || b === undefined ? a : choose(a, b));
const larger = fold(Math.max);
const smaller = fold(Math.min);

/** One record per (layer, site): the engines of a selection merged. */
export function mergeEngines(records, keyOf) {
  const merged = new Map();
  for (const record of records) {
    const key = keyOf(record);
    merged.set(key, merged.has(key) ? mergeSites(merged.get(key), record) : record);
  }
  return merged;
}

function mergeSites(a, b) {
  return {
    ...a,
    phases: Object.fromEntries(PHASES.map((phase) => [phase, mergeParts([a.phases[phase], b.phases[phase]])])),
    absmax: larger(a.absmax, b.absmax),
    absmax_high_water: larger(a.absmax_high_water, b.absmax_high_water),
    headroom: Object.fromEntries(Object.keys(a.headroom).map((name) => [name, smaller(a.headroom[name], b.headroom[name])])),
    formats: Object.fromEntries(Object.keys(a.formats).map((name) => [name, mergeFormats(a.formats[name], b.formats[name])])),
  };
}

function mergeFormats(a, b) {
  return {
    headroom_ratio: smaller(a.headroom_ratio, b?.headroom_ratio),
    sqnr_decibels: smaller(a.sqnr_decibels, b?.sqnr_decibels),
    zeroed_ratio: larger(a.zeroed_ratio, b?.zeroed_ratio),
  };
}

/** Headroom ratios that are known, as [what it is judged by, ratio]: meanings, and resolution in each format. */
export function headrooms({ headroom = {}, formats = {} }) {
  const resolution = Object.entries(formats).map(([name, { headroom_ratio: ratio }]) => [`resolution ${name}`, ratio]);
  return [...Object.entries(headroom), ...resolution].filter(([, ratio]) => ratio !== null && ratio !== undefined);
}

/** Smallest headroom of resolution over the formats, null where none is judged. */
export const leastResolution = ({ formats }) =>
  Object.values(formats).map((each) => each.headroom_ratio).reduce(smaller, null);

/** Statistics of disjoint parts (phases or engines) as one: rms by energy, means by tokens. */
export function mergeParts(parts) {
  const seen = parts.filter(Boolean);
  if (!seen.length) return null;
  const tokens = seen.reduce((sum, part) => sum + part.tokens, 0);
  const mean = (of) => (tokens ? seen.reduce((sum, part) => sum + (part.tokens ? part.tokens * of(part) : 0), 0) / tokens : null);
  const every = (name, choose) => seen.map((part) => part[name]).reduce(choose, null);
  const absmax = every("absmax", larger);
  const rms = tokens ? Math.sqrt(mean((part) => part.rms ** 2)) : null;
  return {
    tokens,
    absmax,
    rms,
    max: every("max", larger),
    min: every("min", smaller),
    mean_abs: mean((part) => part.mean_abs),
    crest_ratio: rms && absmax !== null ? absmax / rms : null,
    nonfinite: seen.reduce((sum, part) => sum + part.nonfinite, 0),
    absmax_high_water: every("absmax_high_water", larger),
  };
}

/** Smallest headroom of a site as {meaning, ratio}, or null where nothing judges it. */
export function worstHeadroom(site) {
  const judged = headrooms(site);
  if (!judged.length) return null;
  const [meaning, ratio] = judged.reduce((a, b) => (b[1] < a[1] ? b : a));
  return { meaning, ratio };
}

/** Sites ordered from least headroom; those nothing judges follow, largest first. */
export function byUrgency(sites) {
  const rank = (site) => worstHeadroom(site)?.ratio ?? Infinity;
  return [...sites].sort((a, b) => rank(a) - rank(b) || (b.absmax ?? -1) - (a.absmax ?? -1));
}
