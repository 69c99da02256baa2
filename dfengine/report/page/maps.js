// Maps: read out of the page's bytes when they are asked for, and drawn over pictures.

const data = JSON.parse(document.getElementById("data").textContent);
const colours = bytesOf(data.colours);

function bytesOf(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  return Uint8Array.from(atob(base64), (letter) => letter.charCodeAt(0));
}

const images = data.items.map((item, place) => new Picture(item, place));

/** An image of the page: its pictures and maps, each decoded once, when it is first wanted. */
function Picture(item, place) {
  let bytes = null;
  const known = new Map();

  const part = (reference) => {
    bytes ??= bytesOf(document.getElementById(`bytes-${place}`).textContent);
    return bytes.subarray(reference.at, reference.at + reference.bytes);
  };
  const once = (reference, read) => {
    if (!known.has(reference.at)) known.set(reference.at, read(reference));
    return known.get(reference.at);
  };
  const picture = async (reference) => {
    const element = new Image();
    element.src = URL.createObjectURL(new Blob([part(reference)], { type: reference.type }));
    await element.decode();
    return element;
  };
  const maps = async (reference) => {
    const stream = new Blob([part(reference)]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Maps(reference, new Uint8Array(await new Response(stream).arrayBuffer()));
  };

  this.maps = (reference) => once(reference, maps);
  this.pictures = () => Promise.all([item.image, ...item.previews].map((reference) => once(reference, picture)));
}

/** A method's maps of all steps, as numbers: float32 with the bytes apart, or levels between two ends. */
function Maps(reference, bytes) {
  const [steps, height, width] = reference.shape;
  const size = height * width;
  const ranges = [], peaks = [];
  let values;
  if (reference.type === "f4") {
    const total = steps * size;
    const together = new Uint8Array(4 * total);
    for (let plane = 0; plane < 4; plane++) {
      for (let i = 0; i < total; i++) together[4 * i + plane] = bytes[plane * total + i];
    }
    values = new Float32Array(together.buffer);
  } else {
    values = new Float32Array(steps * size);
    reference.ends.forEach((ends, step) => {
      const [low, high] = ends ?? [NaN, NaN];
      for (let i = step * size; i < (step + 1) * size; i++) values[i] = low + ((high - low) * bytes[i]) / 255;
    });
  }
  for (let step = 0; step < steps; step++) {
    let [low, high, peak] = [Infinity, -Infinity, 0];
    const here = values.subarray(step * size, (step + 1) * size);
    for (let i = 0; i < size; i++) {
      if (!Number.isFinite(here[i])) continue;
      if (here[i] < low) low = here[i];
      if (here[i] > high) [high, peak] = [here[i], i];
    }
    ranges.push(low <= high ? [low, high] : [NaN, NaN]);
    peaks.push(peak);
  }
  const whole = ranges.filter(([low]) => Number.isFinite(low));

  Object.assign(this, { steps, height, width });
  this.at = (step) => values.subarray(step * size, (step + 1) * size);
  this.peak = (step) => peaks[step];
  this.computed = (step) => Number.isFinite(ranges[step][0]);
  /** The ends of the colours: of one step's map, or of all that are computed. */
  this.range = (step, all) =>
    all ? [Math.min(...whole.map(([low]) => low)), Math.max(...whole.map(([, high]) => high))] : ranges[step];
}

/** Min–max to [0, 1]; a constant map is 0. */
const normalised = (value, [low, high]) => (high > low ? (value - low) / (high - low) : 0);

/** For each of `count` places, the two cells beside it and the weight of the second (half-pixel centres). */
function between(count, cells, smooth) {
  return Array.from({ length: count }, (_, place) => {
    const at = ((place + 0.5) * cells) / count - 0.5;
    if (!smooth) return [Math.floor(at + 0.5), Math.floor(at + 0.5), 0];
    const first = Math.max(0, Math.floor(at));
    return [first, Math.min(first + 1, cells - 1), Math.max(0, at - first)];
  });
}

/** The heat map in colour over a picture, which turns grey beneath it, as RGBA; grey alone where it is not finite. */
function blended(under, maps, step, range, opacity, smooth) {
  const { width, height } = under;
  const out = new ImageData(width, height);
  const grey = Math.min(1, 2 * opacity);
  const values = maps.at(step);
  const columns = between(width, maps.width, smooth);
  const rows = between(height, maps.height, smooth);
  for (let y = 0, i = 0; y < height; y++) {
    const [above, beneath, down] = rows[y];
    for (let x = 0; x < width; x++, i += 4) {
      const [left, right, across] = columns[x];
      const top = values[above * maps.width + left] * (1 - across) + values[above * maps.width + right] * across;
      const low = values[beneath * maps.width + left] * (1 - across) + values[beneath * maps.width + right] * across;
      const share = normalised(top * (1 - down) + low * down, range);
      const place = 3 * Math.max(0, Math.min(255, Math.trunc(256 * share)));
      const there = Number.isFinite(share);
      const light = 0.299 * under.data[i] + 0.587 * under.data[i + 1] + 0.114 * under.data[i + 2];
      for (let channel = 0; channel < 3; channel++) {
        const plain = under.data[i + channel];
        const shaded = plain + grey * (light - plain);
        out.data[i + channel] = there ? (1 - opacity) * shaded + opacity * colours[place + channel] : shaded;
      }
      out.data[i + 3] = 255;
    }
  }
  return out;
}

/** A picture's pixels at a size; small pictures keep their pixels' edges. */
function pixels(picture, width, height) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.imageSmoothingEnabled = picture.naturalWidth > width;
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, width, height);
  return context.getImageData(0, 0, width, height);
}

/** Three significant digits, and no more zeros than needed; a dash for what is not computed. */
function told(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  return value && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(3)));
}
