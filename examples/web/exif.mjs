// Browsers turn pictures as their EXIF orientation says, whether they are asked to or not; a model may have been trained on
// pictures as they are stored. So the EXIF is taken out before a picture is decoded, and the page turns what is to be turned.

/** {bytes, orientation}: a JPEG or PNG without its EXIF, and the orientation 1…8 that this told; other files as they are. */
export function withoutExif(file) {
  const view = new DataView(file.buffer, file.byteOffset, file.byteLength);
  const parts = view.byteLength < 12 ? [] : view.getUint16(0) === 0xffd8 ? segments(view) : view.getUint32(0) === 0x89504e47 ? chunks(view) : [];
  const exif = parts.find(({ name }) => name === "Exif\0\0" || name === "eXIf");
  if (exif === undefined) return { bytes: file, orientation: 1 };
  const bytes = new Uint8Array(file.length - (exif.end - exif.start));
  bytes.set(file.subarray(0, exif.start));
  bytes.set(file.subarray(exif.end), exif.start);
  return { bytes, orientation: orientationOf(new DataView(file.buffer, file.byteOffset + exif.data, exif.end - exif.data)) };
}

/** {data, width, height} of 8-bit RGBA, turned or mirrored as an orientation says. */
export function upright(picture, orientation) {
  if (orientation === 1) return picture;
  const { width, height } = picture;
  const [right, bottom] = [width - 1, height - 1];
  const from = {
    2: (x, y) => [right - x, y], 3: (x, y) => [right - x, bottom - y], 4: (x, y) => [x, bottom - y], 5: (x, y) => [y, x],
    6: (x, y) => [y, bottom - x], 7: (x, y) => [right - y, bottom - x], 8: (x, y) => [right - y, x],
  }[orientation];
  const [wide, tall] = orientation < 5 ? [width, height] : [height, width];
  const stored = new Uint32Array(picture.data.slice().buffer);
  const turned = new Uint32Array(wide * tall);
  for (let y = 0; y < tall; y++) {
    for (let x = 0; x < wide; x++) {
      const [column, row] = from(x, y);
      turned[y * wide + x] = stored[row * width + column];
    }
  }
  return { data: new Uint8ClampedArray(turned.buffer), width: wide, height: tall };
}

// Segments of a JPEG: a marker, the length of what follows, and that.
function segments(view) {
  const found = [];
  for (let at = 2; at + 10 < view.byteLength && view.getUint8(at) === 0xff && view.getUint8(at + 1) !== 0xda; ) {
    const end = at + 2 + view.getUint16(at + 2);
    const name = view.getUint8(at + 1) === 0xe1 ? text(view, at + 4, 6) : "";
    found.push({ name, start: at, data: at + 10, end: Math.min(end, view.byteLength) });
    at = end;
  }
  return found;
}

// Chunks of a PNG: a length, a name, so many bytes, and a check sum.
function chunks(view) {
  const found = [];
  for (let at = 8; at + 12 <= view.byteLength; ) {
    const end = at + 12 + view.getUint32(at);
    found.push({ name: text(view, at + 4, 4), start: at, data: at + 8, end: Math.min(end, view.byteLength) });
    at = end;
  }
  return found;
}

// Tag 0x0112 of the first directory of a TIFF, which is what EXIF is.
function orientationOf(exif) {
  if (exif.byteLength < 10) return 1;
  const little = exif.getUint16(0) === 0x4949;
  const start = exif.getUint32(4, little);
  const count = start + 2 <= exif.byteLength ? exif.getUint16(start, little) : 0;
  for (let at = start + 2; at < start + 2 + 12 * count && at + 12 <= exif.byteLength; at += 12) {
    const value = exif.getUint16(at + 8, little);
    if (exif.getUint16(at, little) === 0x0112) return value >= 1 && value <= 8 ? value : 1;
  }
  return 1;
}

function text(view, start, length) {
  return String.fromCharCode(...new Uint8Array(view.buffer, view.byteOffset + start, length));
}
