// From the numbers of a model to what they say.

/** The outputs' meaning, the largest first: {class, probability}, or {class, value} where they are no classes. */
export function readOut(values, kind, top) {
  const numbers = Array.from(values, Number);
  if (kind === "regression") return numbers.map((value, index) => ({ class: index, value }));
  const most = Math.max(...numbers);
  let shares = numbers.map((value) => (kind === "multi-label" ? 1 / (1 + Math.exp(-value)) : Math.exp(value - most)));
  if (kind === "logits") {
    const sum = shares.reduce((total, share) => total + share, 0);
    shares = shares.map((share) => share / sum);
  }
  const order = shares.map((_, index) => index).sort((a, b) => shares[b] - shares[a]);
  return order.slice(0, top).map((index) => ({ class: index, probability: shares[index] }));
}

/** What the file says of its input and output: {how, kind, names, pixelsIn}; throws an Error for a file without classes. */
export function described(said, session) {
  if (!("slimvit.preprocess" in said)) throw new Error("the file does not say how its input is prepared: slimvit did not write it");
  const kind = said["slimvit.output"] ?? (session.outputMetadata[0].shape.at(-1) > 1 ? "logits" : "regression");
  if (["features", "tokens", "layers"].includes(kind)) throw new Error(`the model gives ${kind}, which have no classes`);
  const names = JSON.parse(said["slimvit.classes"] ?? "[]");
  return { how: JSON.parse(said["slimvit.preprocess"]), kind, names, pixelsIn: session.inputMetadata[0].type === "uint8" };
}
