// The page: opens a picture, takes the strokes and the prompt, and shows what the worker paints.

import { boundingBox, frameOf, opacity, reflected, shrunkMask } from "./framing.js";
import { readWords } from "./words.js";

const MOST_PIXELS = 40e6;
const STROKE = "#e0107f";
const $ = (id) => document.getElementById(id);
const canvases = { picture: $("picture"), result: $("result"), mask: $("mask") };
const [picture, result, mask] = Object.values(canvases).map((each) => each.getContext("2d", { willReadFrequently: true }));
const state = { about: null, page: null, steps: 1, busy: false, tool: "brush", view: "draw", stroke: null };

// A worker from a blob is bound by the policy of this page; one from a file would not be.
const code = `import(${JSON.stringify(new URL("worker.js", import.meta.url).href)});`;
const worker = new Worker(URL.createObjectURL(new Blob([code], { type: "text/javascript" })), { type: "module" });

function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}

function press(group, name, value) {
  for (const each of $(group).querySelectorAll("button")) each.setAttribute("aria-pressed", each.dataset[name] === `${value}`);
}

function element(kind, properties, data = {}) {
  const node = Object.assign(document.createElement(kind), properties);
  Object.assign(node.dataset, data);
  return node;
}

// Picture

function layOut() {
  const { width, height } = canvases.picture;
  const room = $("stage").clientWidth;
  const scale = Math.min(room / width, Math.max(280, innerHeight * 0.68) / height);
  $("frame").style.width = `${width * scale}px`;
  $("frame").style.height = `${height * scale}px`;
  $("frame").classList.toggle("large", scale * devicePixelRatio > 3);
}

/** Shows an image of any kind that a canvas draws, and its mask if there is one. */
function show(image, width, height, region = null) {
  for (const each of Object.values(canvases)) Object.assign(each, { width, height });
  picture.fillStyle = "#fff"; // under transparent pixels
  picture.fillRect(0, 0, width, height);
  picture.drawImage(image, 0, 0);
  if (region) {
    mask.drawImage(region, 0, 0);
    mask.globalCompositeOperation = "source-in";
    mask.fillStyle = STROKE;
    mask.fillRect(0, 0, width, height);
    mask.globalCompositeOperation = "source-over";
  }
  forget();
  layOut();
}

/** Drops the result: it belongs to another picture. */
function forget() {
  for (const id of ["keep", "download"]) $(id).hidden = true;
  document.querySelector("[data-view=compare]").disabled = true;
  view("draw");
}

async function openFile(file) {
  try {
    const bitmap = await createImageBitmap(file);
    if (bitmap.width * bitmap.height > MOST_PIXELS) {
      say(`This picture has ${bitmap.width} × ${bitmap.height} pixels; choose one of at most 40 million.`, true);
      return;
    }
    show(bitmap, bitmap.width, bitmap.height);
    press("examples", "number", -1);
    say("Draw over the part to repaint.");
  } catch {
    say(`${file.name} is no picture that this browser can read; choose a JPEG, PNG or WebP file.`, true);
  }
}

async function openExample(number) {
  const example = state.page.examples[number];
  const load = async (name) => {
    const image = element("img", { src: name });
    await image.decode();
    return image;
  };
  const [image, region] = await Promise.all([load(example.picture), load(example.mask)]);
  show(image, image.width, image.height, region);
  $("prompt").value = example.prompt;
  readPrompt();
  press("examples", "number", number);
}

// Strokes

function stroke(event) {
  const box = canvases.mask.getBoundingClientRect();
  const scale = canvases.mask.width / box.width;
  const point = [(event.clientX - box.left) * scale, (event.clientY - box.top) * scale];
  const [x, y] = state.stroke ?? point;
  mask.globalCompositeOperation = state.tool === "eraser" ? "destination-out" : "source-over";
  mask.strokeStyle = STROKE;
  mask.lineWidth = Math.max(1, ($("size").value / 100) * Math.max(canvases.mask.width, canvases.mask.height));
  mask.lineCap = "round";
  mask.beginPath();
  mask.moveTo(x, y);
  mask.lineTo(point[0] + 0.01, point[1]); // a line of no length is not drawn
  mask.stroke();
  mask.globalCompositeOperation = "source-over";
  state.stroke = point;
}

function divide(event) {
  const box = canvases.mask.getBoundingClientRect();
  $("divider").value = (100 * (event.clientX - box.left)) / box.width;
  compare();
}

function pointer(event) {
  if (state.view === "compare") divide(event);
  else if (!state.busy) stroke(event);
}

canvases.mask.addEventListener("pointerdown", (event) => {
  if (event.button) return;
  canvases.mask.setPointerCapture(event.pointerId);
  state.stroke = null;
  pointer(event);
});
canvases.mask.addEventListener("pointermove", (event) => {
  if (canvases.mask.hasPointerCapture(event.pointerId)) pointer(event);
});

// Before and after

function view(name) {
  state.view = name;
  press("views", "view", name);
  const shown = name === "compare";
  $("frame").classList.toggle("compare", shown);
  for (const id of ["result", "divider", "line"]) $(id).hidden = !shown;
  for (const each of [...$("tools").querySelectorAll("button"), $("size"), $("clear")]) each.disabled = shown;
  compare();
}

function compare() {
  const share = `${$("divider").value}%`;
  canvases.result.style.clipPath = `inset(0 0 0 ${share})`;
  $("line").style.left = share;
}

// Prompt

function readPrompt() {
  if (!state.about) return;
  const { ignored } = readWords($("prompt").value, state.about.vocabulary);
  $("ignored").hidden = !ignored.length;
  $("ignored").textContent = `Not in this model's vocabulary, and ignored: ${[...new Set(ignored)].slice(0, 8).join(", ")}`;
}

function addWord(word) {
  const before = $("prompt").value.trimEnd();
  $("prompt").value = before + (before && word !== "," ? " " : "") + word;
  readPrompt();
}

// Painting

function paint() {
  const { width, height } = canvases.picture;
  const alpha = mask.getImageData(0, 0, width, height).data;
  const region = Uint8Array.from({ length: width * height }, (_, i) => (alpha[4 * i + 3] > 127 ? 1 : 0));
  const hole = boundingBox(region, width, height);
  const seed = Number($("seed").value);
  if (!hole) return say("There is nothing to paint yet: draw over a part of the picture.", true);
  if (!readWords($("prompt").value, state.about.vocabulary).known.length)
    return say("The prompt has no word of this model; choose some of the words below it.", true);
  if (!$("seed").value || !Number.isSafeInteger(seed) || seed < 0)
    return say("The seed is a whole number from 0 to 9007199254740991.", true);
  const frame = frameOf(hole, width, height, state.about);
  const [columns, rows] = frame.size;
  const small = new OffscreenCanvas(columns, rows).getContext("2d");
  small.imageSmoothingQuality = "high";
  small.drawImage(canvases.picture, frame.x, frame.y, frame.w, frame.h, 0, 0, columns, rows);
  const shown = small.getImageData(0, 0, columns, rows).data.filter((_, i) => i % 4 < 3);
  const job = {
    pixels: reflected(shown, 3, frame.size, frame.padded),
    mask: reflected(shrunkMask(region, width, frame), 1, frame.size, frame.padded),
    width: frame.padded[0], height: frame.padded[1],
    prompt: $("prompt").value, steps: state.steps, seed,
  };
  state.job = { frame, region };
  busy(true);
  say("Painting …");
  worker.postMessage({ job });
}

/** Puts what was painted into the picture: the hole replaced, its edge faded. */
function put(painted, { frame, region }) {
  const { x, y, w, h, size, padded } = frame;
  const small = new OffscreenCanvas(...size).getContext("2d");
  const values = small.createImageData(...size);
  for (let i = 0; i < size[0] * size[1]; i++) {
    const from = 3 * (Math.floor(i / size[0]) * padded[0] + (i % size[0]));
    values.data.set([painted[from], painted[from + 1], painted[from + 2], 255], 4 * i);
  }
  small.putImageData(values, 0, 0);
  const full = new OffscreenCanvas(w, h).getContext("2d");
  full.imageSmoothingQuality = "high";
  full.drawImage(small.canvas, 0, 0, w, h);
  const fresh = full.getImageData(0, 0, w, h).data;
  const weight = opacity(region, canvases.picture.width, frame);
  const mixed = picture.getImageData(x, y, w, h);
  for (let i = 0; i < w * h; i++)
    for (let c = 4 * i; c < 4 * i + 3; c++) mixed.data[c] += weight[i] * (fresh[c] - mixed.data[c]);
  result.drawImage(canvases.picture, 0, 0);
  result.putImageData(mixed, x, y);
}

function finish({ painted, seconds }) {
  put(painted, state.job);
  busy(false);
  say(`Painted in ${seconds.toFixed(2)} seconds on this device.`);
  canvases.result.toBlob((blob) => {
    URL.revokeObjectURL($("download").href);
    $("download").href = URL.createObjectURL(blob);
    $("download").hidden = false;
  });
  $("keep").hidden = false;
  document.querySelector("[data-view=compare]").disabled = false;
  view("compare");
  $("stage").scrollIntoView({ block: "nearest" });
}

function busy(on) {
  state.busy = on;
  $("paint").disabled = on;
  $("progress").hidden = !on;
  $("progress").removeAttribute("value");
}

worker.onmessage = ({ data }) => {
  if ("loaded" in data) $("progress").value = data.loaded;
  else if (data.ready) begin(data.ready);
  else if ("step" in data) $("progress").value = data.step / (data.steps + 1);
  else if (data.painted) finish(data);
  else {
    busy(false);
    say(`It cannot paint: ${data.failed}`, true);
  }
};
worker.onerror = () => say("This browser cannot run the page's worker; use a current Chrome, Firefox or Safari.", true);

// Start

function begin(described) {
  Object.assign(state, described);
  const { most_steps: most, sampling } = state.about;
  const usual = sampling.num_inference_steps;
  const choices = most ? [1, 2, 4].filter((n) => n <= most) : [Math.ceil(usual / 4), Math.ceil(usual / 2), usual];
  $("steps").append(...choices.map((n) => element("button", { textContent: n }, { steps: n })));
  chooseSteps(choices.includes(usual) ? usual : choices.at(-1));
  $("chips").append(...state.page.words.map((word) => element("button", { textContent: word }, { word })));
  state.page.examples.forEach(({ picture, prompt }, number) => {
    const button = element("button", { title: prompt }, { number });
    button.append(element("img", { src: picture, alt: `Example ${number + 1}` }));
    $("examples").append(button);
  });
  $("about").textContent = state.page.about;
  busy(false);
  say("Ready: draw over a part of the picture, then paint.");
  readPrompt();
  const empty = $("file").files.length === 0;
  if (empty && state.page.examples.length) openExample(0);
  else if (empty) say("Ready: open a photograph.");
}

function chooseSteps(steps) {
  state.steps = Number(steps);
  press("steps", "steps", steps);
}

const clicks = {
  views: ({ view: name }) => view(name),
  tools: ({ tool }) => press("tools", "tool", (state.tool = tool)),
  steps: ({ steps }) => chooseSteps(steps),
  chips: ({ word }) => addWord(word),
  examples: ({ number }) => state.busy || openExample(Number(number)),
};
for (const [id, act] of Object.entries(clicks))
  $(id).addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (button && !button.disabled) act(button.dataset);
  });
$("clear").onclick = () => mask.clearRect(0, 0, canvases.mask.width, canvases.mask.height);
$("dice").onclick = () => ($("seed").value = Math.floor(Math.random() * 100000));
$("file").onchange = ({ target }) => target.files[0] && !state.busy && openFile(target.files[0]);
$("prompt").oninput = readPrompt;
$("prompt").onkeydown = (event) => event.key === "Enter" && !$("paint").disabled && paint();
$("divider").oninput = compare;
$("paint").onclick = paint;
$("keep").onclick = () => {
  picture.drawImage(canvases.result, 0, 0);
  mask.clearRect(0, 0, canvases.mask.width, canvases.mask.height);
  forget();
  say("Draw over the next part.");
};
addEventListener("resize", layOut);
layOut();
