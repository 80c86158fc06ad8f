// A page that classifies pictures with a file of slimvit's: `?model=model.onnx&labels=labels.txt`, both beside the page.
import * as ort from "onnxruntime-web/wasm";
import { described, readOut } from "./answer.mjs";
import { upright, withoutExif } from "./exif.mjs";
import { metadata } from "./metadata.mjs";
import { modelInput } from "./picture.mjs";

const TOP = 5;
const asked = new URLSearchParams(location.search);
const drop = document.querySelector("#drop");
const opened = open(asked.get("model") ?? "model.onnx", asked.get("labels"));
opened.then(({ name }) => say(`${name} is ready.`), (error) => say(error.message, "error"));

drop.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
drop.addEventListener("dragleave", () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  show(event.dataTransfer.files[0]);
});
drop.querySelector("input").addEventListener("change", (event) => show(event.target.files[0]));

// The model, and what its file says of pictures.
async function open(name, labels) {
  const file = new Uint8Array(await (await fetched(name)).arrayBuffer());
  const said = metadata(file);
  ort.env.wasm.numThreads = 1; // more need a page that is isolated: COOP and COEP headers
  const session = await ort.InferenceSession.create(file, { executionProviders: ["wasm"] });
  const told = described(said, session);
  const names = labels === null ? told.names : (await (await fetched(labels)).text()).trimEnd().split("\n");
  return { ...told, name, session, names };
}

async function fetched(name) {
  const answer = await fetch(name);
  if (!answer.ok) throw new Error(`${name} is not there (${answer.status})`);
  return answer;
}

async function show(picture) {
  if (picture === undefined) return;
  try {
    const { session, names, how, kind, pixelsIn } = await opened;
    say("Looking …");
    const { type, data, shape } = modelInput(await pixelsOf(picture, how.exif_orientation ?? false), how, pixelsIn);
    const start = performance.now();
    const { logits } = await session.run({ image: new ort.Tensor(type, data, shape) }, ["logits"]);
    const took = performance.now() - start;
    const rows = readOut(logits.data, kind, TOP);
    const image = drop.querySelector("img");
    URL.revokeObjectURL(image.src);
    image.src = URL.createObjectURL(picture);
    await image.decode();
    document.querySelector("#answer").replaceChildren(...rows.map((row) => tableRow(row, names)));
    document.body.dataset.logits = JSON.stringify(Array.from(logits.data, Number));
    say(`${picture.name}: one call took ${took.toFixed(1)} ms.`);
  } catch (error) {
    say(`${picture.name}: ${error.message}`, "error");
  }
}

// 8-bit RGBA of a picture as it is stored, or turned upright, without the conversions of colour that browsers make for screens.
async function pixelsOf(picture, turn) {
  const { bytes, orientation } = withoutExif(new Uint8Array(await picture.arrayBuffer()));
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(new Blob([bytes], { type: picture.type }), options);
  const context = new OffscreenCanvas(bitmap.width, bitmap.height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  return upright(context.getImageData(0, 0, bitmap.width, bitmap.height), turn ? orientation : 1);
}

function tableRow(row, names) {
  const line = document.createElement("tr");
  const label = names[row.class] ?? String(row.class);
  const cells = [label, "value" in row ? row.value.toPrecision(4) : `${(100 * row.probability).toFixed(2)} %`];
  for (const text of cells) line.insertCell().textContent = text;
  if ("probability" in row) {
    line.insertCell().append(Object.assign(document.createElement("meter"), { value: row.probability }));
  }
  return line;
}

function say(text, kind = "") {
  Object.assign(document.querySelector("#status"), { textContent: text, className: kind });
}
