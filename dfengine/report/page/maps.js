// Pictures and maps: decoded from the page's bytes on demand, and drawn over one another.

const data = JSON.parse(document.getElementById("data").textContent);
const colours = fromBase64(data.colours);

function fromBase64(text) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

const sources = data.items.map((item, index) => new Source(item, index));

/** The pictures and maps of an image, each decoded once, when it is first needed. */
function Source(item, index) {
  let bytes = null;
  const decoded = new Map();

  const slice = (reference) => {
    bytes ??= fromBase64(document.getElementById(`bytes-${index}`).textContent);
    return bytes.subarray(reference.at, reference.at + reference.bytes);
  };
  const once = (reference, decode) => {
    if (!decoded.has(reference.at)) decoded.set(reference.at, decode(reference));
    return decoded.get(reference.at);
  };
  const decodePicture = async (reference) => {
    const element = new Image();
    element.src = URL.createObjectURL(new Blob([slice(reference)], { type: reference.type }));
    await element.decode();
    return element;
  };
  const decodeMaps = async (reference) => {
    const stream = new Blob([slice(reference)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Maps(reference, new Uint8Array(await new Response(stream).arrayBuffer()));
  };

  this.maps = (reference) => once(reference, decodeMaps);
  this.pictures = () => Promise.all([item.image, ...item.previews].map((reference) => once(reference, decodePicture)));
}

/** The maps of all steps: float32 stored byte plane by byte plane ("f4"), or levels between two ends ("u1"). */
function Maps(reference, bytes) {
  const [steps, height, width] = reference.shape;
  const size = height * width;
  const ranges = [], peaks = [];
  let values;
  if (reference.type === "f4") {
    const total = steps * size;
    const interleaved = new Uint8Array(4 * total);
    for (let plane = 0; plane < 4; plane++) {
      for (let i = 0; i < total; i++) interleaved[4 * i + plane] = bytes[plane * total + i];
    }
    values = new Float32Array(interleaved.buffer);
  } else {
    values = new Float32Array(steps * size);
    reference.ends.forEach((ends, step) => {
      const [low, high] = ends ?? [NaN, NaN];
      for (let i = step * size; i < (step + 1) * size; i++) values[i] = low + ((high - low) * bytes[i]) / 255;
    });
  }
  for (let step = 0; step < steps; step++) {
    let [low, high, peak] = [Infinity, -Infinity, 0];
    const map = values.subarray(step * size, (step + 1) * size);
    for (let i = 0; i < size; i++) {
      if (!Number.isFinite(map[i])) continue;
      if (map[i] < low) low = map[i];
      if (map[i] > high) [high, peak] = [map[i], i];
    }
    ranges.push(low <= high ? [low, high] : [NaN, NaN]);
    peaks.push(peak);
  }
  const computed = ranges.filter(([low]) => Number.isFinite(low));

  Object.assign(this, { steps, height, width });
  this.at = (step) => values.subarray(step * size, (step + 1) * size);
  this.peak = (step) => peaks[step];
  this.isComputed = (step) => Number.isFinite(ranges[step][0]);
  /** Whether a step's map is the same wherever it is computed: there is nothing to see in it. */
  this.isBlank = (step) => ranges[step][0] === ranges[step][1];
  /** The range of the colours: of one step's map, or of all computed maps. */
  this.range = (step, all) =>
    all ? [Math.min(...computed.map(([low]) => low)), Math.max(...computed.map(([, high]) => high))] : ranges[step];
}

/** Min–max to [0, 1]; 0 for an empty range. */
const normalise = (value, [low, high]) => (high > low ? (value - low) / (high - low) : 0);

/** For each of `count` pixels, the two cells around its centre and the weight of the second (half-pixel centres). */
function interpolation(count, cells, smooth) {
  return Array.from({ length: count }, (_, pixel) => {
    const centre = ((pixel + 0.5) * cells) / count - 0.5;
    if (!smooth) return [Math.floor(centre + 0.5), Math.floor(centre + 0.5), 0];
    const first = Math.max(0, Math.floor(centre));
    return [first, Math.min(first + 1, cells - 1), Math.max(0, centre - first)];
  });
}

/** RGBA of a heat map in colour over a picture, which turns grey below it; only grey where the map is not finite, or blank. */
function overlay(background, maps, step, range, opacity, smooth) {
  const { width, height } = background;
  const out = new ImageData(width, height);
  const greyness = Math.min(1, 2 * opacity);
  const values = maps.at(step);
  const isBlank = maps.isBlank(step);
  const columns = interpolation(width, maps.width, smooth);
  const rows = interpolation(height, maps.height, smooth);
  for (let y = 0, i = 0; y < height; y++) {
    const [upper, lower, down] = rows[y];
    for (let x = 0; x < width; x++, i += 4) {
      const [left, right, across] = columns[x];
      const top = values[upper * maps.width + left] * (1 - across) + values[upper * maps.width + right] * across;
      const bottom = values[lower * maps.width + left] * (1 - across) + values[lower * maps.width + right] * across;
      const level = isBlank ? NaN : normalise(top * (1 - down) + bottom * down, range);
      const entry = 3 * Math.max(0, Math.min(255, Math.trunc(256 * level)));
      const grey = 0.299 * background.data[i] + 0.587 * background.data[i + 1] + 0.114 * background.data[i + 2];
      for (let channel = 0; channel < 3; channel++) {
        const original = background.data[i + channel];
        const greyed = original + greyness * (grey - original);
        out.data[i + channel] = Number.isFinite(level) ? (1 - opacity) * greyed + opacity * colours[entry + channel] : greyed;
      }
      out.data[i + 3] = 255;
    }
  }
  return out;
}

/** The pixels of a picture resized to a width and height; enlarged pictures keep sharp pixels. */
function resized(picture, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = picture.naturalWidth > width;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Three significant digits without trailing zeros; a dash for a value that is not finite. */
function format(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return value && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}
