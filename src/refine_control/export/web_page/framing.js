// The part of a picture that the model paints, and how it is put back: `pipeline.framing` for one hole.

const CONTEXT = 0.5; // surroundings on each side, as a share of the hole's longer side
const FEATHER = 1 / 32; // width of the faded edge, as a share of the frame's longer side

/** Bounding box [x0, y0, x1, y1] of the values of `mask` (H W) that are not 0; null where there are none. */
export function boundingBox(mask, width, height) {
  let [x0, y0, x1, y1] = [width, height, 0, 0];
  for (let y = 0; y < height; y++)
    for (let x = 0; x < width; x++)
      if (mask[y * width + x]) [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x + 1), y + 1];
  return x1 ? [x0, y0, x1, y1] : null;
}

/** The frame of a hole: its place in the picture, its size as painted, and that with padding. */
export function frameOf(hole, width, height, { side, multiple }) {
  const [x0, y0, x1, y1] = hole;
  const length = Math.max(side, Math.round(Math.max(x1 - x0, y1 - y0) * (1 + 2 * CONTEXT)));
  const place = (low, high, most) => {
    const extent = Math.min(length, most);
    return [Math.min(Math.max(0, Math.floor((low + high - extent) / 2)), most - extent), extent];
  };
  const [x, w] = place(x0, x1, width);
  const [y, h] = place(y0, y1, height);
  const size = [w, h].map((extent) => Math.max(1, Math.round((extent * side) / Math.max(w, h))));
  const padded = size.map((extent) => Math.ceil(extent / multiple) * multiple);
  return { x, y, w, h, size, padded };
}

/** Mask (H W) of a frame as the model is shown it: in the hole where any pixel of the picture under it is. */
export function shrunkMask(mask, width, { x, y, w, h, size: [columns, rows] }) {
  const small = new Uint8Array(columns * rows);
  for (let j = 0; j < h; j++)
    for (let i = 0; i < w; i++)
      if (mask[(y + j) * width + x + i]) {
        const [a, b] = [Math.floor((i * columns) / w), Math.ceil(((i + 1) * columns) / w)];
        const [c, d] = [Math.floor((j * rows) / h), Math.ceil(((j + 1) * rows) / h)];
        for (let row = c; row < d; row++) small.fill(1, row * columns + a, row * columns + b);
      }
  return small;
}

/** `values` of `channels` a pixel in `size` -> the same in `padded`, continued by reflection. */
export function reflected(values, channels, [width, height], [columns, rows]) {
  const mirror = (i, n) => (n === 1 ? 0 : n - 1 - Math.abs((i % (2 * n - 2)) - (n - 1)));
  const out = new Uint8Array(columns * rows * channels);
  for (let y = 0; y < rows; y++)
    for (let x = 0; x < columns; x++)
      for (let c = 0; c < channels; c++)
        out[(y * columns + x) * channels + c] = values[(mirror(y, height) * width + mirror(x, width)) * channels + c];
  return out;
}

/** Weight (h w) of the painted pixels in a frame: 1 in the hole, falling to 0 within the feather. */
export function opacity(mask, width, { x, y, w, h }) {
  let values = new Float32Array(w * h);
  for (let j = 0; j < h; j++) for (let i = 0; i < w; i++) values[j * w + i] = mask[(y + j) * width + x + i] ? 1 : 0;
  const reach = Math.floor(Math.round(FEATHER * Math.max(w, h)) / 2);
  if (!reach) return values;
  values = boxSums(values, w, h, reach).map((sum) => (sum > 0 ? 1 : 0));
  return boxSums(values, w, h, reach).map((sum) => sum / (2 * reach + 1) ** 2);
}

/** Sums over squares of 2 reach + 1 pixels; beyond the border the last row and column repeat. */
function boxSums(values, w, h, reach) {
  for (const [count, lines, step, line] of [[w, h, 1, w], [h, w, w, 1]]) {
    const out = new Float32Array(values.length);
    const at = (k, i) => values[k * line + Math.min(Math.max(i, 0), count - 1) * step];
    for (let k = 0; k < lines; k++) {
      let sum = 0;
      for (let i = -reach; i <= reach; i++) sum += at(k, i);
      for (let i = 0; i < count; i++) {
        out[k * line + i * step] = sum;
        sum += at(k, i + reach + 1) - at(k, i - reach);
      }
    }
    values = out;
  }
  return values;
}
