// The headline: is every judged site inside its headroom, and if not, the worst by how much and since when.
import { clock, count, duration, exceeded, number, place, plural, ratio } from "./format.js";
import { worstHeadroom } from "./sites.js";

const SERVE = "vllm serve MODEL --plugin maxact";

/** {tone: ok|bad|idle, headline, detail, hint, title} of one answer of the sidecar. */
export function verdict(data) {
  if (!data.models.length) {
    return idle("No engine has connected yet", "Start vLLM with the plugin; it finds this sidecar by itself.", SERVE);
  }
  const active = data.flags.filter((flag) => flag.active);
  if (active.length) return flagged(active, data);
  if (!data.models.some((model) => model.engines.some(sawTokens))) {
    return idle("No tokens seen yet: send a request", `${plural(data.sites.size, "site")} of ${data.selection.model} ready.`);
  }
  return unflagged(data);
}

const sawTokens = ({ tokens }) => Object.values(tokens).some((n) => n > 0);
const idle = (headline, detail, hint = null) => ({ tone: "idle", headline, detail, hint, title: "maxact" });

function flagged(active, { models, nowSeconds }) {
  const worst = active.reduce((a, b) => (severity(b) < severity(a) ? b : a));
  const engines = models.reduce((sum, model) => sum + model.engines.length, 0);
  const whose = engines > 1 ? `${worst.model}, engine ${worst.engine}: ` : "";
  return {
    tone: "bad",
    headline: `${plural(active.length, "flag")} raised, worst: ${place(worst)}, ${excess(worst)} since ${clock(worst.since)}`,
    detail: `${whose}${evidence(worst)}. Raised ${duration(nowSeconds - worst.since)} ago.`,
    hint: null,
    title: `▲ ${plural(active.length, "flag")} – maxact`,
  };
}

const severity = (flag) => flag.headroom_ratio / flag.threshold;
const LIMITS = {
  range: "the calibrated absmax",
  fp16: "the fp16 maximum",
  saturation: "what the deployed scale represents",
};
const limitName = ({ meaning, format }) =>
  format ? `the magnitude at which ${format} zeroes half` : LIMITS[meaning] ?? `the ${meaning} limit`;

/** By how much a flagged site is out, in words. */
function excess(flag) {
  const { headroom_ratio: headroom } = flag;
  return headroom < 1 ? `${ratio(1 / headroom)} ${limitName(flag)}` : `only ${ratio(headroom)} below ${limitName(flag)}`;
}

function evidence(flag) {
  // Of a block format no phase is known, and the largest of a typical block is judged.
  const [what, where] = flag.phase ? ["absmax", `, in phase ${flag.phase}`] : ["block maximum", ""];
  const often = flag.windows ? `. Exceeded in ${exceeded(flag)} windows since ${clock(flag.first_exceeded)}` : "";
  return `${what} ${number(flag.absmax)} against ${limitName(flag)} ${number(flag.limit)}${where}${often}`;
}

function unflagged({ sites, cards, selection, selectedCards }) {
  const judged = [...sites.values()].map((site) => ({ site, least: worstHeadroom(site) })).filter(({ least }) => least);
  if (!judged.length) {
    return idle("No traffic right now: nothing to judge", `No flag is raised. ${selection.model} has seen tokens before.`);
  }
  const { site, least } = judged.reduce((a, b) => (b.least.ratio < a.least.ratio ? b : a));
  const beyond = judged.filter((entry) => entry.least.ratio < 1).length;
  const range = selectedCards.length ? "" : " Range not judged: no card loaded.";
  return {
    tone: "ok",
    headline: beyond
      ? `No flag: ${plural(beyond, "site")} of ${count(judged.length)} beyond the limit, within tolerance`
      : `All ${count(judged.length)} judged sites are inside their headroom`,
    detail: `Closest: ${place(site)}, ${least.meaning} headroom ${ratio(least.ratio)}.${range}`,
    hint: null,
    title: "maxact: inside headroom",
  };
}
