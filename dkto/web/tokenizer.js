// CLIP's byte-pair encoding: a prompt becomes the ids that transformers' CLIPTokenizer gives.

function makeTokenizer({ vocab, merges, length, bos, eos, pad }) {
  const rank = new Map(merges.map((pair, i) => [pair, i])), known = new Map(Object.entries(vocab)), cache = new Map();
  const printable = new Set([[33, 126], [161, 172], [174, 255]].flatMap(([a, b]) => Array.from({ length: b - a + 1 }, (_, i) => a + i)));
  let extra = 256; // GPT-2's alphabet: a sign for each byte, bytes without one come after the others
  const signs = Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable.has(byte) ? byte : extra++));
  const pattern = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+/giu;

  function ids(word) {
    if (cache.has(word)) return cache.get(word);
    let parts = [...new TextEncoder().encode(word)].map((byte) => signs[byte]);
    parts[parts.length - 1] += "</w>";
    while (parts.length > 1) {
      const ranks = parts.slice(1).map((part, i) => rank.get(`${parts[i]} ${part}`) ?? Infinity), best = Math.min(...ranks);
      if (best === Infinity) break;
      const [left, right] = merges[best].split(" "), merged = [];
      for (let i = 0; i < parts.length; i++) {
        if (parts[i] === left && parts[i + 1] === right) { merged.push(left + right); i++; } else merged.push(parts[i]);
      }
      parts = merged;
    }
    cache.set(word, parts.map((part) => known.get(part) ?? eos));
    return cache.get(word);
  }

  return (prompt) => {
    const text = prompt.normalize("NFC").replace(/\s+/g, " ").trim().toLowerCase();
    const found = [bos, ...(text.match(pattern) ?? []).flatMap(ids).slice(0, length - 2), eos];
    return [...found, ...Array(length - found.length).fill(pad)];
  };
}
