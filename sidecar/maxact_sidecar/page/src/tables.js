// The tables around the heat map: flags, worst sites, ranks, cards and the phases of the selected site.
import { makeSpark, updateSpark } from "./charts.js";
import { el, syncTable, text } from "./dom.js";
import { amount, clock, count, criterion, decibels, duration, exceeded, key, number, phases, place, ratio } from "./format.js";
import { byUrgency, leastResolution, mergeParts, PHASES } from "./sites.js";

const WORST_ROWS = 10;

/** Column whose cell is a button naming the site; `onShow(item)` when pressed. */
function placeColumn(onShow) {
  const node = (item) => {
    const button = el("button", { type: "button", className: "link" });
    button.addEventListener("click", () => onShow(button.item));
    return button;
  };
  const update = (button, item) => {
    button.item = item;
    text(button, place(item));
  };
  return { title: "site", node, update };
}

/** SQNR of a site, with the format's name where there are several. */
function noise({ formats }) {
  const entries = Object.entries(formats);
  const name = (format) => (entries.length > 1 ? `${format} ` : "");
  return entries.map(([format, { sqnr_decibels: sqnr }]) => name(format) + decibels(sqnr)).join(", ") || "–";
}

/** Flags of every model and engine, active first. */
export function flagTable(table, onShow) {
  const columns = [
    { title: "state", text: (flag) => (flag.active ? "▲ raised" : "cleared") },
    placeColumn(onShow),
    { title: "meaning", text: criterion },
    { title: "phase", text: (flag) => flag.phase ?? "–" },
    { title: "absmax", numeric: true, text: (flag) => number(flag.absmax) },
    { title: "limit", numeric: true, text: (flag) => number(flag.limit) },
    { title: "headroom", numeric: true, text: (flag) => ratio(flag.headroom_ratio) },
    { title: "raised below", numeric: true, text: (flag) => `${flag.threshold}×` },
    { title: "since", numeric: true, text: (flag) => clock(flag.since) },
    { title: "last exceeded", numeric: true, text: (flag) => clock(flag.last_exceeded) },
    { title: "first exceeded", numeric: true, text: (flag) => clock(flag.first_exceeded) },
    { title: "windows exceeded", numeric: true, text: exceeded },
    { title: "in phases", text: (flag) => phases(flag) ?? "–" },
    { title: "engine", only: "engines", text: (flag) => flag.engine },
    { title: "model", only: "models", text: (flag) => flag.model },
  ];
  const keyOf = (flag) => [flag.model, flag.engine, key(flag), criterion(flag), flag.active, flag.since].join("|");
  return (flags) => syncTable(table, columns, flags, keyOf, (row, flag) => row.classList.toggle("raised", flag.active));
}

/** Sites with the least headroom and their history. */
export function worstTable(table, history, onShow) {
  const columns = [
    placeColumn(onShow),
    { title: "absmax now", numeric: true, text: (site) => number(site.absmax) },
    { title: "high-water", numeric: true, text: (site) => number(site.absmax_high_water) },
    { title: "headroom range", numeric: true, text: (site) => ratio(site.headroom.range) },
    { title: "headroom resolution", numeric: true, text: (site) => ratio(leastResolution(site)) },
    { title: "SQNR", numeric: true, text: noise },
    { title: "crest factor", numeric: true, text: (site) => number(mergeParts(Object.values(site.phases))?.crest_ratio) },
    {
      title: "history",
      node: makeSpark,
      update: (spark, site) => updateSpark(spark, history.times, history.get(key(site))),
    },
  ];
  return (sites, flagged) =>
    syncTable(table, columns, byUrgency(sites).slice(0, WORST_ROWS), key, (row, site) =>
      row.classList.toggle("raised", flagged.has(key(site))));
}

/** One row per rank of every engine. */
export function rankTable(table) {
  const columns = [
    { title: "engine", text: ({ engine }) => engine.engine },
    { title: "rank", text: ({ rank }) => rank.rank },
    { title: "state", text: ({ rank }) => (rank.connected ? "connected" : "✕ gone") },
    { title: "last window", numeric: true, text: ({ rank, now }) => lag(rank.last_window_seconds, now) },
    { title: "windows", numeric: true, text: ({ rank }) => count(rank.windows) },
    { title: "coalesced", numeric: true, text: ({ rank }) => count(rank.coalesced) },
    { title: "first, prefill, decode tokens", numeric: true, text: ({ engine }) => tokens(engine.tokens) },
    { title: "vLLM", text: ({ engine }) => engine.vllm_version || "–" },
    { title: "dtype", text: ({ model }) => model.dtype || "–" },
    { title: "model", only: "models", text: ({ model }) => model.model },
  ];
  const keyOf = ({ model, engine, rank }) => [model.model, engine.engine, rank.rank].join("|");
  return (models, now) => {
    const rows = models.flatMap((model) =>
      model.engines.flatMap((engine) => engine.ranks.map((rank) => ({ model, engine, rank, now }))));
    syncTable(table, columns, rows, keyOf, (row, { rank }) => row.classList.toggle("gone", !rank.connected));
  };
}

const lag = (seconds, now) => (seconds ? `${duration(now - seconds)} ago` : "none yet");
const tokens = (byPhase) => PHASES.map((phase) => amount(byPhase[phase] ?? 0)).join(", ");

export function cardTable(table) {
  const total = (card) => Object.values(card.tokens ?? {}).reduce((sum, n) => sum + n, 0);
  const columns = [
    { title: "card", text: (card) => card.name },
    { title: "model", text: (card) => card.model },
    { title: "tokens", numeric: true, text: (card) => amount(typeof card.tokens === "number" ? card.tokens : total(card)) },
    { title: "sites", numeric: true, text: (card) => count(card.sites) },
  ];
  return (cards) => syncTable(table, columns, cards, (card) => `${card.model}|${card.name}`);
}

/** Statistics of one site, a row per phase and one for all. */
export function phaseTable(table) {
  const value = (title, of) => ({ title, numeric: true, text: ({ part }) => (part ? of(part) : "–") });
  const columns = [
    { title: "phase", text: ({ phase }) => phase },
    value("tokens", (part) => amount(part.tokens)),
    value("absmax", (part) => number(part.absmax)),
    value("high-water", (part) => number(part.absmax_high_water)),
    value("min", (part) => number(part.min)),
    value("max", (part) => number(part.max)),
    value("rms", (part) => number(part.rms)),
    value("mean |x|", (part) => number(part.mean_abs)),
    value("crest", (part) => number(part.crest_ratio)),
    value("non-finite", (part) => count(part.nonfinite)),
  ];
  return (site) => {
    const rows = PHASES.map((phase) => ({ phase, part: site.phases[phase] ?? null }));
    rows.push({ phase: "all", part: mergeParts(rows.map((row) => row.part)) });
    syncTable(table, columns, rows, (row) => row.phase);
  };
}
