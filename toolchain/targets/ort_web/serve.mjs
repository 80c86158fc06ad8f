// Opens one ONNX file in ONNX Runtime Web and answers requests on standard input until that closes.
//
//     node --expose-gc serve.mjs FOLDER MODEL THREADS
//
// FOLDER holds node_modules with onnxruntime-web. Messages are those of wire.py: the length of a JSON header as a
// little-endian uint32, the header, and the raw bytes of its arrays: [name, shape, type]. A request has the inputs of each
// call as "0/image", "1/image" and so on, and how many samples are timed; without that, the outputs of the first
// are sent. The first answer tells what was opened; {"error": ...} answers what failed. Standard output holds messages and nothing else.
import fs from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";

const TYPES = {
  float32: Float32Array, float64: Float64Array, float16: Uint16Array, bool: Uint8Array,
  int8: Int8Array, int16: Int16Array, int32: Int32Array, int64: BigInt64Array,
  uint8: Uint8Array, uint16: Uint16Array, uint32: Uint32Array, uint64: BigUint64Array,
};
// Which fields of ONNX's messages lead to where a weight lies, see onnx.proto; of subgraphs the runtime takes no such weights.
const MESSAGES = {
  model: { 7: "graph" },
  graph: { 1: "node", 5: "tensor" },
  node: { 5: "attribute" },
  attribute: { 5: "tensor" },
  tensor: { 13: "entry" },
  entry: { 1: "key", 2: "value" },
};
for (const name of ["log", "info", "debug"]) console[name] = console.error;
process.on("uncaughtException", (error) => {
  console.error(reason(error));
  process.exit(1);
});

const [folder, model, threads] = process.argv.slice(2);
const ort = createRequire(path.join(path.resolve(folder), "package.json"))("onnxruntime-web");
let session;
try {
  session = await open(model, Number(threads));
  send({ threads: ort.env.wasm.numThreads, inputs: session.inputNames });
} catch (error) {
  send({ error: reason(error) });
}
for (let request = receive(); session && request !== null; request = receive()) {
  try {
    await answer(request);
  } catch (error) {
    send({ error: reason(error) });
  }
}
process.exit(0);

// As every session of slimvit is opened: see ort_options of on_device/runner.py.
async function open(file, count) {
  ort.env.wasm.numThreads = count;
  ort.env.logLevel = "error";
  const options = {
    executionProviders: ["wasm"],
    graphOptimizationLevel: "all",
    executionMode: "sequential",
    logSeverityLevel: 4,
    extra: { session: { force_spinning_stop: "1" } },
  };
  const bytes = fs.readFileSync(file);
  const beside = [...locations(bytes)].map((location) => ({ path: location, data: weights(file, location) }));
  if (beside.length > 0) options.externalData = beside;
  return ort.InferenceSession.create(bytes, options);
}

// The bytes of a file that holds weights of another, as that names it.
function weights(file, location) {
  const within = !path.isAbsolute(location) && !location.split(/[\\/]/).includes("..");
  const whole = path.join(path.dirname(file), location);
  if (!within || !fs.existsSync(whole)) {
    throw new Error(`its weights lie in '${location}', which is not in ${path.dirname(file)}; put that file there`);
  }
  return fs.readFileSync(whole);
}

// The files that an ONNX file names for weights which it does not hold; what is no ONNX file names none.
function locations(bytes, message = MESSAGES.model, found = new Set()) {
  let key, value;
  for (const [field, content] of fields(bytes)) {
    const kind = message[field];
    if (kind === "key") key = content.toString();
    else if (kind === "value") value = content.toString();
    else if (kind) locations(content, MESSAGES[kind], found);
  }
  if (key === "location") found.add(value);
  return found;
}

// [number, content] of every field of a protobuf message that has a length; nothing more where it is damaged.
function* fields(bytes) {
  for (let at = 0; at < bytes.length; ) {
    const tag = varint();
    const kind = tag % 8;
    const size = kind === 2 ? varint() : { 1: 8, 5: 4 }[kind] ?? 0;
    if (kind === 0) varint();
    if (![0, 1, 2, 5].includes(kind) || !(at + size <= bytes.length)) return;
    if (kind === 2) yield [Math.floor(tag / 8), bytes.subarray(at, at + size)];
    at += size;

    function varint() {
      let number = 0;
      for (let scale = 1; ; scale *= 128) {
        const byte = bytes[at++];
        number += (byte % 128) * scale;
        if (!(byte >= 128)) return number;
      }
    }
  }
}

async function answer({ samples, arrays }) {
  const feeds = [];
  for (const [name, shape, type, values] of arrays) {
    const [, index, input] = /^(\d+)\/(.*)$/s.exec(name);
    feeds[index] = { ...feeds[index], [input]: new ort.Tensor(type, values, shape) };
  }
  if (samples === undefined) {
    const outputs = Object.entries(await session.run(feeds[0]));
    return send({}, outputs.map(([name, { type, dims, data }]) => [name, dims, type, data]));
  }
  globalThis.gc?.(); // a collection within a sample would be charged to whichever call it hits
  const times = [];
  for (let index = 0; index < samples; index++) {
    const feed = feeds[index % feeds.length];
    const start = process.hrtime.bigint();
    await session.run(feed);
    times.push(Number(process.hrtime.bigint() - start));
  }
  return send({ times_ns: times });
}

function receive() {
  const length = read(4);
  if (length === null) return null;
  const { arrays, ...request } = JSON.parse(read(length.readUInt32LE()).toString());
  return { ...request, arrays: arrays.map(([name, shape, type]) => [name, shape, type, values(type, shape)]) };
}

function values(type, shape) {
  const count = shape.reduce((product, size) => product * size, 1);
  return new TYPES[type](read(count * TYPES[type].BYTES_PER_ELEMENT).buffer, 0, count);
}

// So many bytes of standard input; null where it closed before the first.
function read(count) {
  const buffer = Buffer.alloc(count);
  for (let at = 0; at < count; ) {
    const got = fs.readSync(0, buffer, at, count - at);
    if (got === 0 && at === 0) return null;
    if (got === 0) throw new Error("standard input closed within a message");
    at += got;
  }
  return buffer;
}

function send(message, arrays = []) {
  const text = Buffer.from(JSON.stringify({ ...message, arrays: arrays.map((array) => array.slice(0, 3)) }));
  const length = Buffer.alloc(4);
  length.writeUInt32LE(text.length);
  const contents = arrays.map(([, , , { buffer, byteOffset, byteLength }]) => Buffer.from(buffer, byteOffset, byteLength));
  for (const part of [length, text, ...contents]) {
    for (let at = 0; at < part.length; ) at += fs.writeSync(1, part, at);
  }
}

function reason(error) {
  return String(error?.message ?? error).replaceAll(/\s+/g, " ");
}
