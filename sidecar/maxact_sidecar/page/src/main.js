// Polls the sidecar and keeps every part of the page in step with its last answer.
import { fetchAll } from "./api.js";
import { makeChart, onSchemeChange } from "./charts.js";
import { $, segmented, syncSelect, text } from "./dom.js";
import { clock, decibels, duration, key, number, place, plural, ratio } from "./format.js";
import { HeatMap, QUANTITIES } from "./heatmap.js";
import { History } from "./history.js";
import { byUrgency, headrooms, mergeEngines } from "./sites.js";
import { cardTable, flagTable, phaseTable, rankTable, worstTable } from "./tables.js";
import { verdict } from "./verdict.js";

const POLL_MS = 2000;
const ALL = "*";
const MERGED_ENGINES = 8; // more engines than this are not fetched together unless asked for
const PHASE_OPTIONS = ["all", "first", "prefill", "decode"].map((name) => [name, name]);

const view = { model: null, engine: null, phase: "all", quantity: "absmax", picked: null, ...fromHash() };
const history = new History();
let data = null;
let failure = null;
let timer = 0;
let polling = false;
let asked = false; // for another answer while one was under way

function fromHash() {
  const hash = Object.fromEntries(new URLSearchParams(location.hash.slice(1)));
  const { model = null, engine = null, phase, quantity } = hash;
  return {
    model,
    engine,
    ...(PHASE_OPTIONS.some(([name]) => name === phase) && { phase }),
    ...(Object.hasOwn(QUANTITIES, quantity ?? "") && { quantity }),
  };
}

function change(patch) {
  const moved = ["model", "engine"].some((name) => name in patch && patch[name] !== view[name]);
  Object.assign(view, patch);
  const { model, engine, phase, quantity } = view;
  const kept = Object.entries({ model, engine, phase, quantity }).filter(([, value]) => value !== null);
  window.history.replaceState(null, "", `#${new URLSearchParams(kept)}`);
  if (!moved) return render();
  view.picked = null;
  poll();
}

/** Which model and engine to show: what the reader chose while it exists, else the first. */
function choose(models) {
  const model = models.find((entry) => entry.model === view.model) ?? models[0];
  if (!model) return null;
  const engines = model.engines.map(({ engine }) => engine);
  const fallback = engines.length === 1 || engines.length > MERGED_ENGINES ? engines[0] : ALL;
  const engine = (view.engine === ALL && engines.length > 1) || engines.includes(view.engine) ? view.engine : fallback;
  return { model: model.model, engine: engine === ALL ? null : engine };
}

async function poll() {
  clearTimeout(timer);
  asked = polling;
  if (polling || document.hidden) return;
  polling = true;
  try {
    const answer = await fetchAll(choose);
    answer.sites = mergeEngines(answer.sites, key);
    answer.selectedCards = answer.models.find(({ model }) => model === answer.selection?.model)?.cards ?? [];
    if (JSON.stringify(answer.selection) !== JSON.stringify(data?.selection)) history.clear();
    data = answer;
    failure = null;
    history.add(answer.nowSeconds, answer.sites);
  } catch (error) {
    failure = { since: failure?.since ?? Date.now() / 1000, reason: error.message };
  }
  polling = false;
  render();
  timer = setTimeout(poll, asked ? 0 : POLL_MS);
}

function render() {
  renderLive();
  document.body.classList.toggle("stale", Boolean(failure));
  if (!data) return;
  renderVerdict();
  renderSelectors();
  renderSources();
  renderMap();
}

function renderLive() {
  const live = $("live");
  live.className = failure ? "bad" : "";
  if (failure) text(live, `Sidecar does not answer since ${clock(failure.since)} (${failure.reason}); still trying`);
  else if (document.hidden) text(live, "paused");
  else text(live, data ? "live" : "");
}

function renderVerdict() {
  const { tone, headline, detail, hint, title } = verdict(data);
  $("verdict").className = tone;
  text($("headline"), headline);
  text($("detail"), detail);
  $("hint").hidden = !hint;
  text($("hint"), hint ?? "");
  document.title = failure ? "maxact: no answer" : title;
  $("flags-section").hidden = !data.flags.length;
  drawFlags(data.flags);
}

function renderSelectors() {
  const { models, selection } = data;
  $("model-field").hidden = $("engine-field").hidden = !selection;
  if (!selection) return;
  const engines = models.find(({ model }) => model === selection.model).engines.map(({ engine }) => [engine, engine]);
  syncSelect($("model"), models.map(({ model }) => [model, model]), selection.model);
  const together = engines.length > 1 ? [[ALL, `all (${engines.length})`]] : [];
  syncSelect($("engine"), [...together, ...engines], selection.engine ?? ALL);
}

function renderSources() {
  $("sources").hidden = !data.models.length;
  document.body.classList.toggle("one-model", data.models.length < 2);
  document.body.classList.toggle("one-engine", data.models.every(({ engines }) => engines.length < 2));
  drawRanks(data.models, data.nowSeconds);
  $("cards").hidden = !data.cards.length;
  drawCards(data.cards);
  $("no-card").hidden = data.cards.length > 0;
}

function renderMap() {
  const { sites, selection } = data;
  $("map-section").hidden = !sites.size;
  if (!sites.size) return;
  const flagged = new Set(data.flags.filter((flag) => flag.active && isSelected(flag, selection)).map(key));
  const ordered = byUrgency(sites.values());
  const selected = sites.has(view.picked) ? view.picked : key(ordered[0]);
  const { quantity, phase } = view;
  heatMap.draw({ sites, flagged, selected, quantity, phase });
  $("phase").disabled = Boolean(QUANTITIES[quantity].headroom);
  renderReadout(pointed && sites.get(key(pointed)));
  const seen = [...sites.values()].some((site) => site.absmax_high_water !== null);
  $("site").hidden = $("worst-section").hidden = !seen;
  if (!seen) return;
  renderSite(sites.get(selected));
  drawWorst(ordered, flagged);
  text($("worst-note"), `Least headroom first; history of absmax since ${clock(history.times[0])}, log scale.`);
}

const isSelected = (flag, { model, engine }) => flag.model === model && (engine === null || flag.engine === engine);

let pointed = null;

function renderReadout(site) {
  const wait = QUANTITIES[view.quantity].headroom
    ? "Headroom is judged over all phases. Point at a cell, or move with the arrow keys."
    : "Point at a cell, or move with the arrow keys; Enter shows its statistics below. Red frame: flag raised.";
  text($("readout"), site ? `${capital(place(site))}: ${summary(site)}` : wait);
}

function summary(site) {
  return `absmax ${number(site.absmax)}, high-water ${number(site.absmax_high_water)}, ${judgement(site)}`;
}

const judgement = (site) => `headroom ${headrooms(site).map(([name, value]) => `${name} ${ratio(value)}`).join(", ")}`;

const cost = ([name, { sqnr_decibels: sqnr, zeroed_ratio: zeroed }]) =>
  sqnr === null ? null : `${name} at the scale of absmax: SQNR ${decibels(sqnr)}, ${(100 * zeroed).toFixed(1)} % zeroed`;

const capital = (sentence) => sentence[0].toUpperCase() + sentence.slice(1);

function renderSite(site) {
  const { range } = site.headroom;
  const values = history.get(key(site));
  const limit = range && site.absmax ? range * site.absmax : null;
  text($("site-title"), capital(place(site)));
  const costs = Object.entries(site.formats).map(cost);
  const facts = [site.module, plural(site.width, "element") + " per token", judgement(site), ...costs];
  text($("site-facts"), facts.filter(Boolean).join(" · ") + (limit ? ` · dashed line: calibrated absmax ${number(limit)}` : ""));
  drawPhases(site);
  const span = duration(history.times.at(-1) - history.times[0]);
  drawChart({ times: history.times, values, limit, label: `absmax of ${place(site)} over ${span}, now ${number(site.absmax)}` });
}

/** Select the site of a flag or row, changing model and engine where it lives elsewhere. */
function show(item) {
  const elsewhere = item.model !== data.selection.model || ![null, item.engine].includes(data.selection.engine);
  change(elsewhere ? { model: item.model, engine: item.engine } : {});
  change({ picked: key(item) });
  heatMap.focus(key(item));
}

const heatMap = new HeatMap($("map"), $("legend"), {
  onPoint: (site) => renderReadout((pointed = site)),
  onSelect: (picked) => change({ picked }),
});
const drawFlags = flagTable($("flags"), show);
const drawWorst = worstTable($("worst"), history, show);
const drawRanks = rankTable($("ranks"));
const drawCards = cardTable($("cards"));
const drawPhases = phaseTable($("site-phases"));
const drawChart = makeChart($("site-chart"));

segmented($("quantity"), Object.entries(QUANTITIES).map(([name, { label }]) => [name, label]), (quantity) => change({ quantity }));
segmented($("phase"), PHASE_OPTIONS, (phase) => change({ phase }));
document.querySelector(`[name=quantity][value=${view.quantity}]`).checked = true;
document.querySelector(`[name=phase][value=${view.phase}]`).checked = true;
$("model").addEventListener("change", (event) => change({ model: event.target.value, engine: null }));
$("engine").addEventListener("change", (event) => change({ model: $("model").value, engine: event.target.value }));
text($("card-commands"), `maxact card ${location.origin} --output CARD.json\nmaxact card ${location.origin} --load CARD.json`);
document.addEventListener("visibilitychange", () => (document.hidden ? renderLive() : poll()));
onSchemeChange(render);
poll();
