// absmax of every site since the page was opened, in constant memory: when full, neighbours merge by max and the
// step doubles, so that a spike never fades.

const CAPACITY = 600;

export class History {
  #every = 1;
  #skipped = 0;
  times = [];
  series = new Map();

  /** Append one poll: `sites` maps key -> record. Null where no token was seen. */
  add(seconds, sites) {
    const start = this.#skipped === 0;
    if (start) this.times.push(seconds);
    for (const [key, site] of sites) {
      if (!this.series.has(key)) this.series.set(key, new Array(this.times.length).fill(null));
      const values = this.series.get(key);
      values.length = this.times.length;
      const last = this.times.length - 1;
      values[last] = max(values[last], site.absmax);
    }
    this.#skipped = (this.#skipped + 1) % this.#every;
    if (this.times.length > CAPACITY) this.#halve();
  }

  get(key) {
    const values = [...(this.series.get(key) ?? [])];
    while (values.length < this.times.length) values.push(null);
    return values.map((value) => value ?? null);
  }

  clear() {
    this.times = [];
    this.series.clear();
    this.#every = 1;
    this.#skipped = 0;
  }

  #halve() {
    this.times = this.times.filter((_, index) => index % 2 === 0);
    for (const [key] of this.series) {
      const values = this.series.get(key);
      this.series.set(key, this.times.map((_, index) => max(values[2 * index], values[2 * index + 1])));
    }
    this.#every *= 2;
    this.#skipped = 0;
  }
}

function max(a, b) {
  if (a === null || a === undefined) return b ?? null;
  return b === null || b === undefined ? a : Math.max(a, b);
}
