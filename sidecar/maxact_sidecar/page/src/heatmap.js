// The heat map as real tables: one focusable cell per site, arrow keys move, Enter or a click selects. Wide screens
// have a column per layer, narrow ones a row per layer; sites outside the layers have a strip of their own.
import { colorScale, inkOn } from "./color.js";
import { el, text } from "./dom.js";
import { compact, key, number, place, ratio } from "./format.js";
import { leastResolution } from "./sites.js";

const LABEL_PX = 118;
const NUMBER_PX = 34;
const TICK_PX = 24;
const ARROWS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
const narrow = matchMedia("(max-width: 700px)");

export const QUANTITIES = {
  absmax: { label: "absmax now", of: (site, phase) => part(site, phase)?.absmax, show: number },
  high_water: { label: "high-water", of: (site, phase) => part(site, phase)?.absmax_high_water, show: number },
  range: { label: "headroom range", of: (site) => site.headroom.range, show: ratio, headroom: true },
  resolution: { label: "headroom resolution", of: leastResolution, show: ratio, headroom: true },
  saturation: { label: "headroom saturation", of: (site) => site.headroom.saturation, show: ratio, headroom: true },
  fp16: { label: "headroom fp16", of: (site) => site.headroom.fp16, show: ratio, headroom: true },
};

const part = (site, phase) => (phase === "all" ? site : site.phases[phase]);

export class HeatMap {
  #cells = new Map();
  #shape = "";
  #sites = new Map();

  /** `onPoint(site)` when a cell is pointed at or focused (null: neither), `onSelect(key)` when it is chosen. */
  constructor(container, legend, { onPoint, onSelect }) {
    Object.assign(this, { container, legend, onPoint, onSelect });
    container.addEventListener("keydown", (event) => this.#move(event));
    for (const [type, handler] of [["focusin", onPoint], ["pointerover", onPoint]]) {
      container.addEventListener(type, (event) => handler(this.#siteAt(event)));
    }
    container.addEventListener("pointerleave", () => onPoint(this.#siteAt({ target: document.activeElement })));
    container.addEventListener("focusout", () => onPoint(null));
    container.addEventListener("click", (event) => this.#select(event));
    new ResizeObserver(() => this.#fit()).observe(container);
    narrow.addEventListener("change", () => this.drawn && this.draw(this.drawn));
  }

  /** drawn: {sites: Map key -> record, flagged: Set of keys, selected: key, quantity, phase}. */
  draw(drawn) {
    this.drawn = drawn;
    this.#sites = drawn.sites;
    this.#build([...drawn.sites.values()]);
    const { of, headroom, label } = QUANTITIES[drawn.quantity];
    const value = (site) => of(site, drawn.phase) ?? null;
    const values = [...drawn.sites.values()].map(value);
    const scale = colorScale(values, headroom);
    for (const [siteKey, site] of drawn.sites) this.#paint(siteKey, site, value(site), scale);
    this.legend.hidden = values.every((each) => each === null);
    drawLegend(this.legend, scale, label, headroom);
  }

  /** Focus the cell of `siteKey`. */
  focus(siteKey) {
    this.#cells.get(siteKey)?.focus();
  }

  #paint(siteKey, site, value, scale) {
    const { quantity, phase, flagged, selected } = this.drawn;
    const { label, show } = QUANTITIES[quantity];
    const cell = this.#cells.get(siteKey);
    const color = value === null ? "" : scale.of(value);
    cell.style.background = color;
    cell.style.color = color && inkOn(color);
    cell.classList.toggle("empty", value === null);
    cell.classList.toggle("flagged", flagged.has(siteKey));
    cell.setAttribute("aria-selected", String(siteKey === selected));
    text(cell.firstElementChild, value === null ? "" : compact(value));
    const shown = value === null ? "no value" : show(value);
    const scope = phase === "all" || QUANTITIES[quantity].headroom ? "" : `, phase ${phase}`;
    cell.setAttribute("aria-label", `${place(site)}: ${label} ${shown}${scope}${flagged.has(siteKey) ? ", flagged" : ""}`);
  }

  #build(sites) {
    const shape = JSON.stringify([narrow.matches, sites.map(key)]);
    if (shape === this.#shape) return;
    this.#shape = shape;
    this.#cells.clear();
    const layers = [...new Set(sites.map((site) => site.layer))].filter((layer) => layer !== null).sort((a, b) => a - b);
    const names = [...new Set(sites.filter((site) => site.layer !== null).map((site) => site.site))];
    const outside = sites.filter((site) => site.layer === null).map((site) => site.site);
    this.container.replaceChildren();
    if (outside.length) this.container.append(this.#table("Sites outside the layers", "strip", [null], outside, true));
    if (layers.length) this.container.append(this.#table("Layers and sites", "grid", layers, names, narrow.matches));
    for (const table of this.container.children) table.querySelector(".cell")?.setAttribute("tabindex", "0");
    this.#fit();
  }

  #table(label, className, layers, names, layersDown) {
    const [rows, columns] = layersDown ? [layers, names] : [names, layers];
    const head = el("tr", {}, el("td"), ...columns.map((name) => heading("col", name)));
    const body = rows.map((row) => el("tr", {}, heading("row", row), ...columns.map((column) =>
      this.#cell(layersDown ? { layer: row, site: column } : { layer: column, site: row }))));
    const table = el("table", { className, role: "grid", "aria-label": label }, el("thead", {}, head), el("tbody", {}, ...body));
    table.classList.toggle("down", layersDown);
    table.dataset.columns = columns.length;
    return table;
  }

  #cell(at) {
    if (!this.#sites.has(key(at))) return el("td", { className: "void" });
    const cell = el("td", { className: "cell", role: "gridcell", tabIndex: -1, "data-key": key(at) }, el("span"));
    this.#cells.set(key(at), cell);
    return cell;
  }

  /** Numbers in the cells where they fit, layer numbers as often as they fit. */
  #fit() {
    const table = this.container.querySelector(".grid");
    if (!table) return;
    const down = table.classList.contains("down");
    const width = (this.container.clientWidth - (down ? 40 : LABEL_PX)) / table.dataset.columns;
    table.classList.toggle("numbers", width >= NUMBER_PX);
    const every = down ? 1 : [1, 2, 5, 10, 20].find((step) => step * width >= TICK_PX) ?? 50;
    table.querySelectorAll("thead th").forEach((th, index) => th.classList.toggle("quiet", index % every !== 0));
  }

  #siteAt(event) {
    return this.#sites.get(event.target?.closest?.(".cell")?.dataset.key) ?? null;
  }

  #select(event) {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    cell.focus();
    this.onSelect(cell.dataset.key);
  }

  #move(event) {
    const cell = event.target.closest(".cell");
    if (!cell) return;
    if (event.key === "Enter" || event.key === " ") this.onSelect(cell.dataset.key);
    else if (!this.#step(cell, event.key)) return;
    event.preventDefault();
  }

  #step(cell, pressed) {
    const rows = [...cell.closest("tbody").rows];
    const [row, column] = [cell.parentElement.rowIndex - 1, cell.cellIndex];
    const line = [...rows[row].cells].filter((other) => other.matches(".cell"));
    const target = { Home: line[0], End: line.at(-1) }[pressed] ?? neighbour(rows, row, column, ARROWS[pressed]);
    if (!target) return pressed in ARROWS;
    for (const other of cell.closest("table").querySelectorAll(".cell[tabindex='0']")) other.tabIndex = -1;
    target.tabIndex = 0;
    target.focus();
    return true;
  }
}

function neighbour(rows, row, column, direction) {
  if (!direction) return null;
  const [down, right] = direction;
  let cell;
  do {
    row += down;
    column += right;
    cell = rows[row]?.cells[column];
  } while (cell?.matches(".void"));
  return cell?.matches(".cell") ? cell : null;
}

function heading(scope, name) {
  return el("th", { scope }, el("span", {}, name === null ? "outside the layers" : String(name)));
}

function drawLegend(legend, { low, high, of }, label, headroom) {
  const blocks = Array.from({ length: 24 }, (_, index) => {
    const block = el("i");
    block.style.background = of(low * (high / low) ** (index / 23));
    return block;
  });
  const show = headroom ? ratio : number;
  legend.replaceChildren(
    el("span", {}, show(low)), el("span", { className: "ramp" }, ...blocks), el("span", {}, show(high)),
    el("span", { className: "note" }, `${label}, log`),
  );
}
