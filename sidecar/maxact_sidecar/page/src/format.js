// Numbers, times and names as people read them.

const PREFIXES = ["", "k", "M", "G", "T"];

/** Engineering notation: 23.1 k, 0.052, 4.0e-6, 1.2e33. Null becomes a dash. */
export function number(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const power = 3 * Math.floor(Math.log10(Math.abs(Number(value.toPrecision(digits)))) / 3);
  if (power >= 0 && power / 3 < PREFIXES.length) {
    return `${significant(value / 10 ** power, digits)} ${PREFIXES[power / 3]}`.trimEnd();
  }
  if (power === -3 && Math.abs(value) >= 0.01) return significant(value, digits);
  return `${significant(value / 10 ** power, digits)}e${power}`;
}

function significant(value, digits) {
  const rounded = Number(value.toPrecision(digits));
  return rounded.toFixed(Math.max(0, digits - 1 - Math.floor(Math.log10(Math.abs(rounded)))));
}

/** At most four characters for a cell of the heat map. */
export function compact(value) {
  const size = Math.abs(value);
  return size >= 99.5 && size < 999.5 ? String(Math.round(value)) : number(value, 2).replace(" ", "");
}

/** A number of things: whole below a thousand. */
export const amount = (value) => (Math.abs(value) < 1000 ? String(value) : number(value));
export const ratio = (value) => (value === null || value === undefined ? "–" : `${number(value)}×`);
export const decibels = (value) => (value === null || value === undefined ? "–" : `${value.toFixed(1)} dB`);
export const count = (value) => (value ?? 0).toLocaleString("en-US");
export const plural = (n, word) => `${count(n)} ${word}${n === 1 ? "" : "s"}`;

/** Clock time of epoch seconds, with the date when it is not today's. */
export function clock(seconds) {
  if (!seconds) return "–";
  const at = new Date(seconds * 1000);
  const time = at.toLocaleTimeString("en-GB");
  return at.toDateString() === new Date().toDateString() ? time : `${at.toLocaleDateString("en-CA")} ${time}`;
}

export function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 1) return "< 1 s";
  if (s < 120) return `${Math.round(s)} s`;
  if (s < 7200) return `${Math.round(s / 60)} min`;
  return s < 172_800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86_400)} d`;
}

/** What a flag is judged by: its meaning, and of resolution the format. */
export const criterion = ({ meaning, format }) => (format ? `${meaning} ${format}` : meaning);

/** Of how many windows, since the first that exceeded, how many did. */
export const exceeded = ({ windows, windows_exceeded: beyond }) => (windows ? `${count(beyond)} of ${count(windows)}` : "–");

/** In which phases windows exceeded, and in how many; null where no phase is known. */
export function phases({ phases_exceeded: windows }) {
  const seen = Object.entries(windows).filter(([, n]) => n > 0);
  return seen.length ? seen.map(([phase, n]) => `${phase} ${count(n)}`).join(", ") : null;
}

export const place = ({ layer, site }) => (layer === null ? site : `layer ${layer} ${site}`);
export const key = ({ layer, site }) => `${layer ?? ""}/${site}`;
