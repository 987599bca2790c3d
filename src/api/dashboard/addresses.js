// Address arithmetic for the pool and the map. Numbers are BigInt, because an IPv6 address has 128 bits.

/** Parses an address. Returns its value and its length in bits, or null if it is not an address. */
function parse(address) {
  if (address.includes(":")) {
    const [head, tail] = address.split("::");
    const words = (part) => (part ? part.split(":") : []);
    const [before, after] = [words(head), words(tail)];
    const gap = tail === undefined ? 0 : 8 - before.length - after.length;
    const all = [...before, ...Array(Math.max(gap, 0)).fill("0"), ...after];
    if (all.length !== 8 || !all.every((word) => /^[\da-f]{1,4}$/i.test(word))) return null;
    return { bits: 128, value: all.reduce((sum, word) => (sum << 16n) | BigInt(`0x${word}`), 0n) };
  }
  const bytes = address.split(".").map(Number);
  if (bytes.length !== 4 || !bytes.every((byte) => byte >= 0 && byte < 256)) return null;
  return { bits: 32, value: bytes.reduce((sum, byte) => (sum << 8n) | BigInt(byte), 0n) };
}

function format(value, bits) {
  const step = bits === 32 ? 8 : 16;
  const parts = [];
  for (let at = bits - step; at >= 0; at -= step) {
    parts.push(((value >> BigInt(at)) & ((1n << BigInt(step)) - 1n)).toString(bits === 32 ? 10 : 16));
  }
  if (bits === 32) return parts.join(".");
  // Omits the longest run of zeros, the first of equally long ones, as Rust does.
  const runs = parts.join(":").match(/\b0(:0)+\b/g) ?? [];
  const longest = runs.reduce((best, run) => (run.length > best.length ? run : best), "");
  if (!longest) return parts.join(":");
  return parts.join(":").replace(new RegExp(`(^|:)${longest}(:|$)`), "::");
}

/** Returns functions that convert between slots and subnets of the pool. */
export function division(pool) {
  const [address, prefix] = pool.network.split("/");
  const base = parse(address);
  if (!base) return null;
  const { bits, value } = base;
  const shift = BigInt(bits - pool.subnet_len);
  const size = Math.min(2 ** Math.min(pool.subnet_len - Number(prefix), 16), 65536);
  return {
    size,
    subnet: (slot) => `${format(value + (BigInt(slot) << shift), bits)}/${pool.subnet_len}`,
    /** The block of consecutive slots that share a shorter prefix. */
    block: (slot, slots) =>
      `${format(value + (BigInt(slot) << shift), bits)}/${pool.subnet_len - Math.log2(slots)}`,
    /** Null for subnets outside the pool, such as those of the other family in dual stack. */
    slot: (subnet) => {
      const at = parse(subnet.split("/")[0]);
      if (!at || at.bits !== bits || at.value < value) return null;
      const slot = Number((at.value - value) >> shift);
      return slot < size ? slot : null;
    },
  };
}

/** Returns the network (/24 or /64) by which the map groups hosts. */
export function networkOf(address) {
  const at = parse(address ?? "");
  if (!at) return "unknown network";
  const length = at.bits === 32 ? 24 : 64;
  const shift = BigInt(at.bits - length);
  return `${format((at.value >> shift) << shift, at.bits)}/${length}`;
}
