// The sidecar's JSON, fetched relative to the page so that a path prefix of a proxy keeps working.

const TIMEOUT_MS = 10_000;

async function get(path) {
  const response = await fetch(path, { signal: AbortSignal.timeout(TIMEOUT_MS), cache: "no-store" });
  if (!response.ok) throw new Error(`${path.split("?")[0]} answers ${response.status}`);
  return { body: await response.json(), date: response.headers.get("date") };
}

/** Everything the page shows for one selection. `choose(models)` names the {model, engine} to fetch sites for. */
export async function fetchAll(choose) {
  const { body: models, date } = await get("api/v1/models");
  const selection = choose(models);
  const [sites, flags, cards] = await Promise.all([
    selection ? get(`api/v1/sites?${query(selection)}`) : { body: [] },
    get("api/v1/flags"),
    get("api/v1/cards"),
  ]);
  return {
    models,
    selection,
    sites: sites.body,
    flags: flags.body,
    cards: cards.body,
    // Ages are taken against the sidecar's clock: the browser's may be minutes off.
    nowSeconds: (Date.parse(date) || Date.now()) / 1000,
  };
}

function query({ model, engine }) {
  return new URLSearchParams(engine === null ? { model } : { model, engine });
}
