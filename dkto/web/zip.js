// A zip file without compression, of {name: bytes}: PNGs are compressed already.

const CRC = Uint32Array.from({ length: 256 }, (_, n) => {
  for (let k = 0; k < 8; k++) n = n & 1 ? 0xedb88320 ^ (n >>> 1) : n >>> 1;
  return n >>> 0;
});
const crc32 = (bytes) => (bytes.reduce((crc, byte) => CRC[(crc ^ byte) & 255] ^ (crc >>> 8), 0xffffffff) ^ 0xffffffff) >>> 0;

function zipOf(files) {
  const parts = [], entries = [];
  let offset = 0;
  const add = (list, bytes) => { list.push(bytes); return bytes.length; };
  const record = (fields) => { // [bytes of the number, number], little-endian
    const view = new DataView(new ArrayBuffer(fields.reduce((sum, [size]) => sum + size, 0)));
    let at = 0;
    for (const [size, value] of fields) { size === 2 ? view.setUint16(at, value, true) : view.setUint32(at, value, true); at += size; }
    return new Uint8Array(view.buffer);
  };
  const midnight = 33; // 1 January 1980: the same files give the same bytes
  for (const [name, bytes] of Object.entries(files)) {
    const title = new TextEncoder().encode(name), start = offset;
    const about = [[2, 20], [2, 0x800], [2, 0], [2, 0], [2, midnight], [4, crc32(bytes)], [4, bytes.length], [4, bytes.length], [2, title.length], [2, 0]];
    for (const piece of [record([[4, 0x04034b50], ...about]), title, bytes]) offset += add(parts, piece);
    entries.push(record([[4, 0x02014b50], [2, 20], ...about, [2, 0], [2, 0], [2, 0], [4, 0], [4, start]]), title);
  }
  const size = entries.reduce((sum, piece) => sum + piece.length, 0), count = Object.keys(files).length;
  parts.push(...entries, record([[4, 0x06054b50], [2, 0], [2, 0], [2, count], [2, count], [4, size], [4, offset], [2, 0]]));
  const out = new Uint8Array(parts.reduce((sum, piece) => sum + piece.length, 0));
  let at = 0;
  for (const piece of parts) { out.set(piece, at); at += piece.length; }
  return out;
}

// A table as CSV; a cell with a comma, a quote or a line end stands in quotes.
const csvOf = (rows) => rows.map((row) => row.map((cell) => (/[",\n\r]/.test(cell) ? `"${String(cell).replaceAll('"', '""')}"` : cell)).join(",") + "\n").join("");
