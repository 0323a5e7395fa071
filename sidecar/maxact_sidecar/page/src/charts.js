// uPlot charts: a sparkline per worst site, and the history of the selected one with the limit it is judged by.
import uPlot from "uplot";
import { clock, number } from "./format.js";

const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const SPARK = { width: 200, height: 26 };
const CHART_HEIGHT = 190;

const MIN_SPAN_SECONDS = 10;
const timeRange = (u, min, max) => (min === null ? [0, MIN_SPAN_SECONDS] : [min, Math.max(max, min + MIN_SPAN_SECONDS)]);

const logRange = (u, min, max) => {
  if (!(max > 0)) return [1, 10];
  const [low, high] = [Math.max(min, max * 1e-9), max];
  const pad = Math.max((high / low) ** 0.15, 1.4);
  return [low / pad, high * pad];
};

/** Element with a uPlot sparkline inside; give it data with `updateSpark`. */
export function makeSpark() {
  const holder = document.createElement("div");
  holder.className = "spark";
  holder.setAttribute("role", "img");
  holder.plot = new uPlot(
    {
      ...SPARK,
      legend: { show: false },
      cursor: { show: false },
      select: { show: false },
      padding: [3, 3, 3, 3],
      axes: [{ show: false }, { show: false }],
      scales: { x: { time: false, range: timeRange }, y: { distr: 3, range: logRange } },
      series: [{}, { stroke: () => css("--ink"), width: 1.25, points: { show: sparse } }],
    },
    [[], []],
    holder,
  );
  return holder;
}

const sparse = (u) => u.data[0].length < 3;

export function updateSpark(holder, times, values) {
  holder.plot.setData([times, positive(values)]);
  const seen = values.filter((value) => value !== null);
  const label = seen.length
    ? `absmax since ${clock(times[0])}: least ${number(Math.min(...seen))}, most ${number(Math.max(...seen))}`
    : "no tokens since the page was opened";
  if (holder.getAttribute("aria-label") !== label) holder.setAttribute("aria-label", label);
}

// A log axis has no zero.
const positive = (values) => values.map((value) => (value > 0 ? value : null));

/** History chart of one site in `container`, as wide as it. Returns update({times, values, limit, label}). */
export function makeChart(container) {
  const plot = new uPlot(
    {
      width: Math.max(container.clientWidth, 240),
      height: CHART_HEIGHT,
      legend: { show: false },
      cursor: { drag: { x: false, y: false }, points: { size: 6 } },
      padding: [10, 28, 0, 0],
      scales: { x: { range: timeRange }, y: { distr: 3, range: logRange } },
      axes: [
        { ...axis(), size: 26, space: 70, values: timeTicks },
        { ...axis(), size: 58, splits: logTicks, filter: (u, ticks) => ticks, values: (u, ticks) => ticks.map((t) => number(t, 2)) },
      ],
      series: [
        {},
        { stroke: () => css("--ink"), width: 1.5, points: { show: sparse } },
        { stroke: () => css("--bad"), width: 1.25, dash: [5, 4], points: { show: false } },
      ],
    },
    [[], [], []],
    container,
  );
  container.setAttribute("role", "img");
  new ResizeObserver(() => {
    if (container.clientWidth) plot.setSize({ width: container.clientWidth, height: CHART_HEIGHT });
  }).observe(container);
  return ({ times, values, limit, label }) => {
    plot.setData([times, positive(values), times.map(() => limit)]);
    container.setAttribute("aria-label", label);
  };
}

const axis = () => ({
  stroke: () => css("--muted"),
  font: "11px system-ui, sans-serif",
  grid: { stroke: () => css("--line"), width: 1 },
  ticks: { stroke: () => css("--line"), width: 1, size: 4 },
});

const FINE = [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8];

/** Round values of a log axis, as many per decade as do not crowd. */
function logTicks(u, axisIndex, min, max) {
  const span = max / min;
  const steps = span > 1000 ? [1] : span > 8 ? [1, 2, 5] : FINE;
  const decades = Array.from({ length: Math.ceil(Math.log10(max / min)) + 2 }, (_, i) => 10 ** (Math.floor(Math.log10(min)) + i));
  return decades.flatMap((decade) => steps.map((step) => step * decade)).filter((tick) => tick >= min && tick <= max);
}

const timeTicks = (u, ticks) => ticks.map((t) => clock(t).split(" ").at(-1));

export function onSchemeChange(redraw) {
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
}
