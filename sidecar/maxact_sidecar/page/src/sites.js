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
    int8_zeroed_ratio: larger(a.int8_zeroed_ratio, b.int8_zeroed_ratio),
    int8_sqnr_db: smaller(a.int8_sqnr_db, b.int8_sqnr_db),
  };
}

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

/** Smallest headroom of a site over its meanings as {meaning, ratio}, or null where nothing judges it. */
export function worstHeadroom(site) {
  const judged = Object.entries(site.headroom ?? {}).filter(([, ratio]) => ratio !== null && ratio !== undefined);
  if (!judged.length) return null;
  const [meaning, ratio] = judged.reduce((a, b) => (b[1] < a[1] ? b : a));
  return { meaning, ratio };
}

/** Sites ordered from least headroom; those nothing judges follow, largest first. */
export function byUrgency(sites) {
  const rank = (site) => worstHeadroom(site)?.ratio ?? Infinity;
  return [...sites].sort((a, b) => rank(a) - rank(b) || (b.absmax ?? -1) - (a.absmax ?? -1));
}
