// Where each node of the radix trees stands in the picture. Positions in the sequence run from left to right; every leaf
// has a row of its own, and a node is as tall as all the leaves that go on from it. So tall means shared.

/**
 * Trees grouped by whose cache they are. A group is {title, part, rows, placed}; an entry of `placed` is a node with its
 * first `row`, its number of `rows`, its `level`, and its neighbours `up`, `down`, `before` and `after`, for the keys.
 */
export function layOut(nodes) {
  const known = new Map(nodes.map((node) => [node.id, { ...node, children: [] }]));
  const groups = new Map();
  for (const node of known.values()) {
    const parent = known.get(node.parent);
    if (parent) parent.children.push(node);
    else {
      const title = `${node.part === "lr" ? "LR cache" : "Base cache"} of ${node.owner}`;
      const group = groups.get(title) ?? { title, part: node.part, roots: [], placed: [], rows: 0 };
      group.roots.push(node);
      groups.set(title, group);
    }
  }
  const ordered = [...groups.values()].sort((a, b) => (a.part === b.part ? 0 : a.part === "base" ? -1 : 1));
  for (const group of ordered) placeGroup(group);
  linkNeighbours(ordered);
  return ordered;
}

/** Without recursion, since one trajectory of many short turns is a long path. */
function placeGroup(group) {
  const waiting = group.roots.map((node) => ({ node, level: 1 })).reverse();
  while (waiting.length) {
    const { node, level } = waiting.pop();
    Object.assign(node, { level, row: group.rows, rows: 1 });
    group.placed.push(node);
    if (node.children.length === 0) group.rows += 1;
    for (const child of [...node.children].reverse()) waiting.push({ node: child, level: level + 1 });
  }
  for (const node of [...group.placed].reverse()) {
    if (node.children.length) node.rows = node.children.reduce((sum, child) => sum + child.rows, 0);
  }
}

function linkNeighbours(groups) {
  const roots = groups.flatMap((group) => group.roots);
  const families = [roots, ...groups.flatMap((group) => group.placed.map((node) => node.children))];
  for (const family of families) {
    family.forEach((node, index) => Object.assign(node, { before: family[index - 1], after: family[index + 1] }));
  }
  for (const group of groups) {
    for (const node of group.placed) {
      node.down = node.children[0];
      for (const child of node.children) child.up = node;
    }
  }
}

/** What a node is, in a sentence or two. */
export function describe(node) {
  const tokens = (number) => `${number} ${number === 1 ? "token" : "tokens"}`;
  const what = node.part === "lr" ? `LR cache of ${node.owner}` : `base cache of ${node.owner}`;
  const hands = node.writers.map(([role, length]) => `${role} (${tokens(length)})`);
  return {
    title: `Positions ${node.start} to ${node.start + node.length - 1}: ${tokens(node.length)} of the ${what}`,
    written: hands.length ? `Written by ${listed(hands)}.` : "Nobody is known to have written it.",
    read: node.readers.length ? `Read by ${listed(node.readers)}.` : "Read by nobody yet.",
    held: node.held ? `Held by ${node.held} running ${node.held === 1 ? "request" : "requests"} now.` : "Held by no request now.",
    idle: node.held ? "" : `Idle for ${node.idle_s < 10 ? node.idle_s.toFixed(1) : Math.round(node.idle_s)} s.`,
  };
}

function listed(words) {
  return words.length < 2 ? words.join("") : `${words.slice(0, -1).join(", ")} and ${words.at(-1)}`;
}
