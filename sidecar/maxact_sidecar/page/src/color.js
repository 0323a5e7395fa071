// Log colour scale, viridis: ordered in lightness, so that it also reads in grey and with any colour vision.
import { scaleSequentialLog } from "d3-scale";
import { interpolateViridis } from "d3-scale-chromatic";

/**
 * Scale over positive `values`; bright always means "look here", so `reversed` (headroom) makes small values bright.
 * The domain ends on 1, 2 or 5 times a power of ten: colours hold still while values wander.
 */
export function colorScale(values, reversed) {
  const positive = values.filter((value) => value > 0);
  let low = positive.length ? nice(Math.min(...positive), Math.floor) : 1;
  let high = positive.length ? nice(Math.max(...positive), Math.ceil) : 10;
  if (high / low < 10) [low, high] = [low / 2, high * 2];
  const scale = scaleSequentialLog(reversed ? [high, low] : [low, high], interpolateViridis).clamp(true);
  return { low, high, of: (value) => scale(Math.max(value, low)) };
}

function nice(value, round) {
  const decade = 10 ** Math.floor(Math.log10(value));
  const steps = [1, 2, 5, 10];
  const step = round === Math.floor ? steps.findLast((s) => s * decade <= value) : steps.find((s) => s * decade >= value);
  return (step ?? 1) * decade;
}

/** Black or white, whichever has the higher WCAG contrast on `rgb(r, g, b)` or `#rrggbb`. */
export function inkOn(color) {
  const channels = color.startsWith("#")
    ? [1, 3, 5].map((at) => Number.parseInt(color.slice(at, at + 2), 16))
    : color.match(/\d+/g).map(Number);
  const [r, g, b] = channels.map((c) => (c <= 10 ? c / 3295 : ((c / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.179 ? "#000" : "#fff";
}
