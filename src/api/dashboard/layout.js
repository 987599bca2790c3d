// Positions of the hosts on the map: a ring for a few hosts of one network, columns for a few hosts of
// several networks, and a grid of small tiles for many.

const HEADER = 28;
const PAD = 12;

/** `groups` is [[network, members]], the one of this host first. Tiles are positioned by their centers. */
export function layout(groups, width) {
  const total = groups.reduce((sum, [, members]) => sum + members.length, 0);
  const narrow = width < 620;
  const tile = { w: narrow ? 104 : 140, h: 64 };
  if (groups.length === 1 && total <= (narrow ? 6 : width < 900 ? 10 : 14)) {
    return ring(groups[0][1], width, tile, narrow);
  }
  const tallest = Math.max(...groups.map(([, members]) => members.length));
  const column = tile.w + 2 * PAD;
  if (tallest <= 8 && groups.length * (column + (narrow ? 16 : 72)) <= width) {
    return columns(groups, width, tile, tallest);
  }
  return grid(groups, width, narrow);
}

function ring(members, width, tile, narrow) {
  // This host is at the left, or at the top of a narrow page.
  const start = narrow ? -Math.PI / 2 : Math.PI;
  const across = Math.min(width / 2 - tile.w / 2 - 4, 420);
  const up = members.length <= (narrow ? 1 : 2) ? 0 : 64 + members.length * 12;
  const height = 2 * up + tile.h + 24;
  const place = (node, i) => {
    const angle = start + (2 * Math.PI * i) / members.length;
    const alone = members.length === 1;
    return {
      node,
      x: width / 2 + (alone ? 0 : across * Math.cos(angle)),
      y: height / 2 + up * Math.sin(angle),
    };
  };
  return { height, tile, small: false, boxes: [], tiles: members.map(place) };
}

function columns(groups, width, tile, tallest) {
  const step = tile.h + 14;
  const height = HEADER + tallest * step + PAD;
  const share = width / groups.length;
  const w = tile.w + 2 * PAD;
  const boxes = [];
  const tiles = [];
  groups.forEach(([label, members], i) => {
    const x = Math.round(share * (i + 0.5));
    boxes.push({ label, x: x - w / 2, y: 0, w, h: HEADER + members.length * step });
    members.forEach((node, k) => tiles.push({ node, x, y: HEADER + k * step + tile.h / 2 }));
  });
  return { height, tile, small: false, boxes, tiles };
}

/** Places boxes of tiles in rows. */
function grid(groups, width, narrow) {
  const least = (narrow ? 62 : 86) + 7;
  const most = Math.max(1, Math.floor((width - 2 * PAD + 7) / least));
  const across = Math.floor((width - 2 * PAD + 7) / most);
  const tile = { w: across - 7, h: 30 };
  const down = tile.h + 7;
  const boxes = [];
  const tiles = [];
  let [left, top, shelf] = [0, 0, 0];
  for (const [label, members] of mergeSingleHosts(groups)) {
    // A label needs the width of two tiles.
    const wide = Math.min(most, Math.max(members.length, 2));
    const w = wide * across - 7 + 2 * PAD;
    const h = HEADER + Math.ceil(members.length / wide) * down - 7 + PAD;
    if (left > 0 && left + w > width) [left, top, shelf] = [0, top + shelf + 12, 0];
    boxes.push({ label, x: left, y: top, w, h });
    members.forEach((node, i) => {
      const x = left + PAD + (i % wide) * across + tile.w / 2;
      tiles.push({ node, x, y: top + HEADER + Math.floor(i / wide) * down + tile.h / 2 });
    });
    left += w + 12;
    shelf = Math.max(shelf, h);
  }
  return { height: top + shelf, tile, small: true, boxes, tiles };
}

/** Merges networks with a single host into one box if there are many of them. */
function mergeSingleHosts(groups) {
  const single = groups.filter(([, members]) => members.length === 1);
  if (single.length <= 8) return groups;
  const rest = groups.filter(([, members]) => members.length > 1);
  const alone = ["networks with one host each", single.flatMap(([, members]) => members)];
  return [...rest, alone];
}
