// From the pixels of a picture to the model's input, as the file's metadata says: what examples/infer_onnx.py does with
// Pillow. A browser's own drawImage resizes with other filters, and its answers differ.

/** What stands for the picture in the model: the data and shape of a tensor, floats [1, C, H, W] or pixels [1, H, W, C].
 *
 * `picture` is {data, width, height}, data 8-bit RGBA; `how` is the file's "slimvit.preprocess".
 */
export function modelInput(picture, how, pixelsIn) {
  const [channels, height, width] = how.input_size;
  const seen = resized(withChannels(picture, channels), how);
  if (pixelsIn) return { type: "uint8", data: Uint8Array.from(seen.data), shape: [1, height, width, channels] };
  const data = new Float32Array(channels * height * width);
  const [mean, std] = [how.mean, how.std].map((values) => Float32Array.from(values));
  for (let at = 0; at < seen.data.length; at++) {
    const channel = at % channels;
    const share = Math.fround(Math.fround(seen.data[at] / 255) - mean[channel]);
    data[channel * height * width + Math.floor(at / channels)] = share / std[channel];
  }
  return { type: "float32", data, shape: [1, channels, height, width] };
}

// RGB, or grey as ITU-R 601 weighs the colours; transparency is left out.
function withChannels({ data, width, height }, channels) {
  const kept = new Uint8ClampedArray(width * height * channels);
  for (let from = 0, to = 0; from < data.length; from += 4) {
    if (channels === 1) {
      kept[to++] = (data[from] * 19595 + data[from + 1] * 38470 + data[from + 2] * 7471 + 0x8000) >> 16;
    } else {
      for (let channel = 0; channel < 3; channel++) kept[to++] = data[from + channel];
    }
  }
  return { data: kept, width, height, channels };
}

// The picture at the model's size, by timm's evaluation transform: see `resized` of infer_onnx.py.
function resized(picture, how) {
  const [channels, height, width] = how.input_size;
  const filter = how.interpolation;
  if (how.crop_pct == null) return scaled(picture, width, height, filter);
  const [tall, wide] = [height, width].map((size) => Math.floor(size / how.crop_pct));
  const ratios = [picture.height / tall, picture.width / wide];
  const by = (ratio) => [even(picture.width / ratio), even(picture.height / ratio)];
  let fill = new Array(channels).fill(0);
  let size;
  if (how.crop_mode === "squash") {
    size = [wide, tall];
  } else if (how.crop_mode === "border") {
    size = by(Math.max(...ratios));
    fill = how.mean.map((value) => even(255 * value));
  } else if (tall === wide) {
    const short = Math.min(picture.width, picture.height);
    size = [picture.width, picture.height].map((side) => (side === short ? tall : Math.trunc((tall * side) / short)));
  } else {
    size = by(Math.min(...ratios));
  }
  return cropped(scaled(picture, ...size, filter), width, height, fill);
}

// The middle of a picture; what is too small is first filled up, the odd pixel on the right and at the bottom.
function cropped(picture, width, height, fill) {
  const [across, down] = [Math.max(width - picture.width, 0), Math.max(height - picture.height, 0)];
  const left = even((picture.width + across - width) / 2) - Math.floor(across / 2);
  const top = even((picture.height + down - height) / 2) - Math.floor(down / 2);
  const { channels } = picture;
  const data = new Uint8ClampedArray(width * height * channels);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [from, row] = [x + left, y + top];
      const inside = from >= 0 && from < picture.width && row >= 0 && row < picture.height;
      const start = (row * picture.width + from) * channels;
      data.set(inside ? picture.data.subarray(start, start + channels) : fill, (y * width + x) * channels);
    }
  }
  return { data, width, height, channels };
}

// Pillow's filters: how far one reaches, and its weight at a distance.
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(1 - Math.abs(x), 0)],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (Math.fround(0.54) + Math.fround(0.46) * Math.cos(Math.PI * x)))],
  bicubic: [2, (x) => cubic(Math.abs(x))],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0);
const BITS = 22; // behind the point of a weight: sums of 8-bit pixels are of whole numbers

// Pillow's resize: each row, then each column, is rounded to 8 bits. (Newer versions begin with the columns where that is
// cheaper; then a pixel may be one step of 8 bits off.)
function scaled(picture, width, height, filter) {
  if (filter === "nearest") return nearest(picture, width, height);
  let { data, channels } = picture;
  if (width !== picture.width) {
    data = along(data, picture.width, width, picture.height, { step: channels, row: picture.width * channels }, channels, filter);
  }
  if (height !== picture.height) {
    data = along(data, picture.height, height, width, { step: width * channels, row: channels }, channels, filter);
  }
  return { data, width, height, channels };
}

function nearest(picture, width, height) {
  const { channels } = picture;
  const data = new Uint8ClampedArray(width * height * channels);
  const [columns, rows] = [middles(picture.width, width), middles(picture.height, height)];
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const start = (rows[y] * picture.width + columns[x]) * channels;
      data.set(picture.data.subarray(start, start + channels), (y * width + x) * channels);
    }
  }
  return { data, width, height, channels };
}

// The pixel below the middle of each new one; sums, because those are what Pillow rounds down.
function middles(size, wanted) {
  let at = (size / wanted) * 0.5;
  return Array.from({ length: wanted }, () => {
    const below = Math.floor(at);
    at += size / wanted;
    return below;
  });
}

// One axis of `size` pixels, `step` numbers apart, becomes one of `wanted`; `lines` of them lie `row` numbers apart.
function along(data, size, wanted, lines, { step, row }, channels, filter) {
  const across = step === channels;
  const out = new Uint8ClampedArray(lines * wanted * channels);
  const [outStep, outRow] = across ? [channels, wanted * channels] : [lines * channels, channels];
  weights(size, wanted, filter).forEach(({ first, taps }, to) => {
    for (let line = 0; line < lines; line++) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = 2 ** (BITS - 1);
        const start = line * row + first * step + channel;
        for (let tap = 0; tap < taps.length; tap++) sum += data[start + tap * step] * taps[tap];
        out[line * outRow + to * outStep + channel] = Math.floor(sum / 2 ** BITS);
      }
    }
  });
  return out;
}

// For each pixel of the new axis, where the pixels begin that it is made of, and their weights in whole numbers.
function weights(size, wanted, filter) {
  if (!(filter in FILTERS)) throw new Error(`the file asks for the filter ${filter}, which this example has not`);
  const [reach, weight] = FILTERS[filter];
  const scale = size / wanted;
  const stretch = Math.max(scale, 1);
  return Array.from({ length: wanted }, (_, to) => {
    const centre = (to + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach * stretch + 0.5), 0);
    const end = Math.min(Math.trunc(centre + reach * stretch + 0.5), size);
    const raw = Array.from({ length: end - first }, (_, tap) => weight((tap + first - centre + 0.5) * (1 / stretch)));
    const sum = raw.reduce((total, each) => total + each, 0);
    const whole = raw.map((each) => (sum === 0 ? each : each / sum) * 2 ** BITS);
    return { first, taps: whole.map((each) => Math.trunc(each + (each < 0 ? -0.5 : 0.5))) };
  });
}

// As Python rounds: halves to the even number.
function even(value) {
  const below = Math.floor(value);
  if (value - below !== 0.5) return Math.round(value);
  return below % 2 === 0 ? below : below + 1;
}
