// The arithmetic of addresses that the pool's picture and the map need. Numbers are BigInt, since an IPv6
// address has 128 bits.

/** The number an address is, and its length in bits; null for what is no address. */
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
  // The longest row of zeros is left out, the first of equals, as Rust prints it.
  const runs = parts.join(":").match(/\b0(:0)+\b/g) ?? [];
  const longest = runs.reduce((best, run) => (run.length > best.length ? run : best), "");
  if (!longest) return parts.join(":");
  return parts.join(":").replace(new RegExp(`(^|:)${longest}(:|$)`), "::");
}

/** The pool as numbers: what slot a subnet is, what subnet a slot is. */
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
    /** A block of slots in a row that share a prefix. */
    block: (slot, slots) =>
      `${format(value + (BigInt(slot) << shift), bits)}/${pool.subnet_len - Math.log2(slots)}`,
    /** Null for subnets elsewhere, such as the other family's in dual stack. */
    slot: (subnet) => {
      const at = parse(subnet.split("/")[0]);
      if (!at || at.bits !== bits || at.value < value) return null;
      const slot = Number((at.value - value) >> shift);
      return slot < size ? slot : null;
    },
  };
}

/** The network by which hosts stand together on the map. */
export function neighbourhood(address) {
  const at = parse(address ?? "");
  if (!at) return "unknown network";
  const length = at.bits === 32 ? 24 : 64;
  const shift = BigInt(at.bits - length);
  return `${format((at.value >> shift) << shift, at.bits)}/${length}`;
}
