// What an ONNX file says of itself. ONNX Runtime Web does not tell, so it is read from the protobuf: field 14 of a
// ModelProto, metadata_props, holds entries of a key (field 1) and a value (field 2).
const VARINT = 0, EIGHT_BYTES = 1, BYTES = 2, FOUR_BYTES = 5;

/** Key → value of the metadata of an ONNX file, given as a Uint8Array; throws an Error for what is no protobuf. */
export function metadata(file) {
  const text = (entry, field) => new TextDecoder().decode(fields(entry, field)[0]);
  return Object.fromEntries(fields(file, 14).map((entry) => [text(entry, 1), text(entry, 2)]));
}

// The values of one field that holds bytes; all others, the graph with its weights among them, are stepped over.
function fields(bytes, wanted) {
  const found = [];
  let at = 0;
  const varint = () => {
    let value = 0;
    for (let scale = 1; ; scale *= 128) { // no shifts: they would cut lengths to 32 bits
      const byte = bytes[at++];
      if (byte === undefined || scale > 2 ** 63) throw new Error("this is no ONNX file, or it is truncated");
      value += (byte & 127) * scale;
      if (byte < 128) return value;
    }
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (![VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES].includes(kind)) throw new Error("this is no ONNX file");
    const length = kind === VARINT ? varint() * 0 : kind === EIGHT_BYTES ? 8 : kind === FOUR_BYTES ? 4 : varint();
    if (at + length > bytes.length) throw new Error("this is no ONNX file, or it is truncated");
    if (kind === BYTES && Math.floor(tag / 8) === wanted) found.push(bytes.subarray(at, at + length));
    at += length;
  }
  return found;
}
