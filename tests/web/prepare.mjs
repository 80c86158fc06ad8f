// JSON on stdin, [{how, picture: {file, width, height}, pixelsIn}], files of RGBA bytes → [numbers] on stdout, one for each.
import { readFileSync } from "node:fs";
import { pathToFileURL } from "node:url";

const { modelInput } = await import(pathToFileURL(process.argv[2]));
const cases = JSON.parse(readFileSync(0));
console.log(JSON.stringify(cases.map(({ how, picture, pixelsIn }) => {
  const data = new Uint8ClampedArray(readFileSync(picture.file));
  return Array.from(modelInput({ ...picture, data }, how, pixelsIn).data);
})));
