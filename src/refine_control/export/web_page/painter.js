// The inpainting pipeline of an exported folder (pipeline.json, page.json and ONNX graphs), run by onnxruntime-web.
// H W pixels, h w latents, T text tokens

import * as ort from "./ort/ort.wasm.bundle.min.mjs";
import { normals } from "./noise.js";
import { readWords, tokenIds } from "./words.js";

// The graphs were optimised at their export: once more takes seconds and makes no step faster.
const OPTIONS = { executionProviders: ["wasm"], graphOptimizationLevel: "disabled" };
const float = (data, dims) => new ort.Tensor("float32", data, dims);

/** Noise levels from 1 to 0, steps + 1 of them, as `pipeline.painting.sampling_sigmas`. */
export function noiseLevels(steps, spacing, shift) {
  const shifted = (sigma) => (shift * sigma) / (1 + (shift - 1) * sigma);
  if (spacing === "even") return Array.from({ length: steps + 1 }, (_, i) => shifted(1 - i / steps));
  const least = shifted(0.001); // the scheduler shifts twice
  const levels = Array.from({ length: steps }, (_, i) => 1 - (i / Math.max(1, steps - 1)) * (1 - least));
  return [...levels.map(shifted), 0];
}

/** One file, its bytes reported as they come. */
async function download(url, report) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} cannot be read (${answer.status}); copy the folder again`);
  const parts = [];
  for (const reader = answer.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    parts.push(value);
    report(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

export class Painter {
  /** Loads the graphs beside this module; `report(share)` is called with 0 to 1. */
  static async load(report = () => {}) {
    const painter = new Painter();
    const here = (name) => new URL(name, import.meta.url).href;
    const read = async (name) => JSON.parse(new TextDecoder().decode(await download(here(name), () => {})));
    [painter.about, painter.page] = await Promise.all([read("pipeline.json"), read("page.json")]);
    ort.env.wasm.numThreads = 1; // more of them need headers that a plain file server does not send
    ort.env.wasm.wasmPaths = { wasm: here("ort/ort-wasm-simd-threaded.wasm") };
    let got = 0;
    const total = Object.values(painter.page.bytes).reduce((a, b) => a + b, 0);
    painter.graphs = {};
    for (const [part, name] of Object.entries(painter.about.parts)) {
      const bytes = await download(here(name), (more) => report((0.95 * (got += more)) / total));
      painter.graphs[part] = await ort.InferenceSession.create(bytes, OPTIONS);
    }
    report(1);
    return painter;
  }

  /** Prompt embeddings (1, T, D) and pooled ones (1, P): the CLIPs side by side, zeros where T5 would be. */
  async encode(prompt) {
    const outputs = [];
    for (const part of Object.keys(this.page.tables)) {
      const table = this.page.tables[part];
      const ids = tokenIds(readWords(prompt, this.about.vocabulary).known, table);
      const tokens = new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
      outputs.push(await this.graphs[part].run({ input_ids: tokens }));
    }
    const widths = outputs.map(({ hidden }) => hidden.dims[2]);
    const count = outputs[0].hidden.dims[1];
    const width = this.about.text_width || widths.reduce((a, b) => a + b, 0);
    const length = count + this.about.max_sequence_length;
    const embeds = new Float32Array(length * width);
    let left = 0;
    outputs.forEach(({ hidden }, i) => {
      for (let t = 0; t < count; t++) embeds.set(hidden.data.subarray(t * widths[i], (t + 1) * widths[i]), t * width + left);
      left += widths[i];
    });
    const pooled = Float32Array.from(outputs.flatMap((each) => [...each.pooled.data]));
    return {
      prompt_embeds: float(embeds, [1, length, width]),
      pooled_prompt_embeds: float(pooled, [1, pooled.length]),
    };
  }

  /** What the ControlNet reads, (1, 17, h, w): latents of the picture without its hole, and 1 - mask. */
  async condition({ pixels, mask, width, height }) {
    const plane = width * height;
    const values = new Float32Array(3 * plane);
    for (let i = 0; i < plane; i++)
      for (let c = 0; c < 3; c++) values[c * plane + i] = mask[i] ? -1 : pixels[3 * i + c] / 127.5 - 1;
    const { latents } = await this.graphs.vae_encoder.run({ pixel_values: float(values, [1, 3, height, width]) });
    const [, channels, h, w] = latents.dims;
    const cond = new Float32Array((channels + 1) * h * w);
    cond.set(latents.data);
    const side = this.about.downscale;
    for (let y = 0; y < h; y++)
      for (let x = 0; x < w; x++) cond[(channels * h + y) * w + x] = mask[side * (y * width + x)] ? 0 : 1;
    return float(cond, [1, channels + 1, h, w]);
  }

  /**
   * Paints the hole: pixels (H W 3) of 0 to 255, mask (H W) not 0 in the hole -> pixels (H W 3), the whole picture.
   * Width and height are multiples of the model's. `progress(step, steps)` is called after each step.
   */
  async paint({ pixels, mask, width, height, prompt, steps, seed }, progress = () => {}) {
    const { sampling, shift, latent_channels: channels } = this.about;
    const { guidance_scale: guidance, conditioning_scale: strength } = sampling;
    const cond = await this.condition({ pixels, mask, width, height });
    const dims = [1, channels, cond.dims[2], cond.dims[3]];
    const count = dims.reduce((a, b) => a * b);
    const texts = [await this.encode(prompt), ...(guidance > 1 ? [await this.encode("")] : [])];
    const levels = noiseLevels(steps, sampling.sigmas, shift);
    const latents = normals(count, seed, "initial noise", 0);
    for (let step = 0; step < steps; step++) {
      const [sigma, next] = [levels[step], levels[step + 1]];
      const shared = {
        noisy_latents: float(latents, dims),
        control_cond: cond,
        sigmas: float(Float32Array.of(sigma), [1]),
        conditioning_scale: float(Float32Array.of(strength), []),
      };
      const answers = [];
      for (const text of texts) answers.push((await this.graphs.denoiser.run({ ...shared, ...text })).velocity.data);
      const [v, empty] = answers;
      const fresh = sampling.stochastic && next > 0 ? normals(count, seed, "fresh noise", step, 0) : null;
      for (let i = 0; i < count; i++) {
        const velocity = empty ? empty[i] + guidance * (v[i] - empty[i]) : v[i];
        const clean = latents[i] - sigma * velocity;
        latents[i] = fresh ? (1 - next) * clean + next * fresh[i] : latents[i] + (next - sigma) * velocity;
      }
      progress(step + 1, steps);
    }
    const { pixel_values: values } = await this.graphs.vae_decoder.run({ latents: float(latents, dims) });
    const painted = new Uint8ClampedArray(3 * width * height); // rounds and clips
    const plane = width * height;
    for (let i = 0; i < plane; i++)
      for (let c = 0; c < 3; c++) painted[3 * i + c] = (values.data[c * plane + i] / 2 + 0.5) * 255;
    return painted;
  }
}
