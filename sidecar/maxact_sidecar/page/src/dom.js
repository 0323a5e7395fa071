// The few DOM idioms of this page. Strings of the API only ever become text nodes or attributes.

export const $ = (id) => document.getElementById(id);

/** Element with properties, `data`/`aria` attributes and children (strings become text). */
export function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name in node) node[name] = value;
    else node.setAttribute(name, value);
  }
  node.append(...children);
  return node;
}

/** Set text only when it changed: keeps selections alive and live regions quiet. */
export function text(node, value) {
  if (node.textContent !== value) node.textContent = value;
}

/** Children of `parent` become `nodes` in that order; nodes already in place are not touched. */
function arrange(parent, nodes) {
  const focused = document.activeElement;
  nodes.forEach((node, index) => {
    if (parent.children[index] !== node) parent.insertBefore(node, parent.children[index] ?? null);
  });
  while (parent.children.length > nodes.length) parent.lastChild.remove();
  if (focused !== document.activeElement && focused.isConnected) focused.focus({ preventScroll: true });
}

/**
 * Roles are spelt out because narrow screens lay rows out as blocks, which drops the implied ones.
 * Keep a table's rows in step with `items`. Rows live as long as their key, so focus and charts in them do.
 * columns: [{title, text(item), numeric?, only?: "models"|"engines" (shown when there are several),
 *   node?(item) -> element made once per row, update?(element, item)}]
 */
export function syncTable(table, columns, items, keyOf, decorate = () => {}) {
  if (!table.tHead) buildHead(table, columns);
  const body = table.tBodies[0];
  const rows = new Map([...body.rows].map((row) => [row.dataset.key, row]));
  arrange(body, items.map((item) => {
    const row = rows.get(keyOf(item)) ?? buildRow(columns, item, keyOf(item));
    columns.forEach((column, index) => updateCell(row.cells[index], column, item));
    decorate(row, item);
    return row;
  }));
}

function buildHead(table, columns) {
  const head = columns.map((column) => el("th", { scope: "col", role: "columnheader", className: classOf(column) }, column.title));
  table.setAttribute("role", "table");
  table.append(el("thead", { role: "rowgroup" }, el("tr", { role: "row" }, ...head)), el("tbody", { role: "rowgroup" }));
}

function buildRow(columns, item, key) {
  const cells = columns.map((column) =>
    el("td", { role: "cell", className: classOf(column), "data-title": column.title }, ...(column.node ? [column.node(item)] : [])));
  return el("tr", { role: "row", "data-key": key }, ...cells);
}

const classOf = ({ numeric, only }) => [numeric && "num", only && `several-${only}`].filter(Boolean).join(" ");

function updateCell(cell, column, item) {
  if (column.update) column.update(cell.firstElementChild, item);
  else if (!column.node) text(cell, column.text(item));
}

/** Options of a select become `options` ([value, label]); the selected one is `value`. */
export function syncSelect(select, options, value) {
  const wanted = JSON.stringify(options);
  if (select.dataset.options !== wanted) {
    select.dataset.options = wanted;
    select.replaceChildren(...options.map(([v, label]) => el("option", { value: v }, label)));
  }
  select.value = value;
}

/** A radio group as a segmented control. */
export function segmented(fieldset, options, onChange) {
  for (const [value, label] of options) {
    const input = el("input", { type: "radio", name: fieldset.id, value });
    input.addEventListener("change", () => onChange(value));
    fieldset.append(el("label", {}, input, el("span", {}, label)));
  }
}
