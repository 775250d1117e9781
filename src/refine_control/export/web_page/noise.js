// The noise of a seed, the same as PyTorch's: `randomness.slot_normals` in JavaScript.

const LOW = (1n << 64n) - 1n;
const START = [
  0x6a09e667f3bcc908n, 0xbb67ae8584caa73bn, 0x3c6ef372fe94f82bn, 0xa54ff53a5f1d36f1n,
  0x510e527fade682d1n, 0x9b05688c2b3e6c1fn, 0x1f83d9abfb41bd6bn, 0x5be0cd19137e2179n,
];
const ORDERS = [
  [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3],
  [11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4], [7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8],
  [9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13], [2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9],
  [12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11], [13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10],
  [6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5], [10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0],
];
const COLUMNS = [
  [0, 4, 8, 12], [1, 5, 9, 13], [2, 6, 10, 14], [3, 7, 11, 15], [0, 5, 10, 15], [1, 6, 11, 12], [2, 7, 8, 13],
  [3, 4, 9, 14],
];

const rotate = (value, bits) => ((value >> bits) | (value << (64n - bits))) & LOW;

/** BLAKE2b (RFC 7693) of fewer than 129 bytes, digest of 8 bytes read as a little-endian integer. */
function digest(bytes) {
  const block = new Uint8Array(128);
  block.set(bytes);
  const words = new BigUint64Array(block.buffer);
  const first = START[0] ^ 0x01010008n;
  const v = [first, ...START.slice(1), ...START];
  v[12] ^= BigInt(bytes.length);
  v[14] ^= LOW;
  for (let round = 0; round < 12; round++) {
    const order = ORDERS[round % 10];
    COLUMNS.forEach(([a, b, c, d], i) => {
      [[32n, 24n], [16n, 63n]].forEach(([left, right], half) => {
        v[a] = (v[a] + v[b] + words[order[2 * i + half]]) & LOW;
        v[d] = rotate(v[d] ^ v[a], left);
        v[c] = (v[c] + v[d]) & LOW;
        v[b] = rotate(v[b] ^ v[c], right);
      });
    });
  }
  return first ^ v[0] ^ v[8];
}

/** A 63-bit seed from integers and words, as `randomness.derive_seed`. */
export function deriveSeed(...parts) {
  return digest(new TextEncoder().encode(parts.join("\x1f"))) >> 1n;
}

/** The 32-bit numbers of mt19937. */
function twister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let next = 624;
  return () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** `count` standard normals, at least 16: `torch.randn` on the CPU but for the last digit. */
export function normals(count, ...parts) {
  const random = twister(Number(deriveSeed(...parts) & 0xffffffffn)); // torch seeds by the low 32 bits
  const values = new Float32Array(count);
  const uniform = () => (random() & 0xffffff) / 2 ** 24;
  const transform = (start) => {
    for (let i = start; i < start + 8; i++) {
      const radius = Math.sqrt(-2 * Math.log(1 - values[i]));
      const angle = Math.fround(Math.fround(2 * Math.PI) * values[i + 8]);
      values[i] = radius * Math.cos(angle);
      values[i + 8] = radius * Math.sin(angle);
    }
  };
  for (let i = 0; i < count; i++) values[i] = uniform();
  for (let i = 0; i + 16 <= count; i += 16) transform(i);
  if (count % 16) {
    for (let i = count - 16; i < count; i++) values[i] = uniform();
    transform(count - 16);
  }
  return values;
}
