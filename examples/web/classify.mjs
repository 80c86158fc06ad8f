// Classifies pictures in Node with an ONNX file that slimvit wrote:  node classify.mjs model.onnx picture.jpg …
// As JSON: picture → the largest outputs. `npm ci` in this folder first.
import { readFileSync } from "node:fs";
import * as ort from "onnxruntime-web";
import sharp from "sharp";
import { described, readOut } from "./answer.mjs";
import { metadata } from "./metadata.mjs";
import { modelInput } from "./picture.mjs";

const [model, ...pictures] = process.argv.slice(2);
const file = readFileSync(model);
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(file, { executionProviders: ["wasm"] });
const { how, kind, pixelsIn } = described(metadata(file), session);

const found = {};
for (const picture of pictures) {
  const opened = sharp(picture, { autoOrient: how.exif_orientation ?? false });
  const { data, info } = await opened.toColourspace("srgb").ensureAlpha().raw().toBuffer({ resolveWithObject: true });
  const input = modelInput({ data, width: info.width, height: info.height }, how, pixelsIn);
  const feeds = { image: new ort.Tensor(input.type, input.data, input.shape) };
  const { logits } = await session.run(feeds, ["logits"]);
  found[picture] = readOut(logits.data, kind, 5);
}
console.log(JSON.stringify(found, null, 2));
