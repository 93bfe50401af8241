"use strict";
// Pictures of numbers per row (parameter or layer) and step, painted on a uPlot canvas: its axes, zoom and cursor are used.

E.decode = (field, count) => {
  if (field.cells) return field;
  const text = atob(field.codes);
  field.cells = Uint8Array.from({ length: text.length }, (_, i) => text.charCodeAt(i));
  delete field.codes;
  return field;
};

E.valueOf = (field, code) =>
  code === 0 ? null : code === 1 ? 0 : field.low * Math.pow(field.high / field.low, (code - 2) / 253);

E.stop = ([r, g, blue]) => (255 << 24) | (blue << 16) | (g << 8) | r;

// The values at the ends of the colours.
E.ends = (field, name) => {
  const [low, high] = E.data.colors[name] ?? [field.low, field.high];
  return [low, Math.max(high, field.high)];
};

// A colour for each code of a field, the palest below the first of its ends.
E.palette = (field, [low, high]) => {
  const stops = [0, 1, 2, 3, 4].map((i) => {
    const hex = parseInt(E.color("heat" + i).slice(1), 16);
    return [hex >> 16, (hex >> 8) & 255, hex & 255];
  });
  const colors = new Uint32Array(256);
  for (let code = 2; code < 256; code++) {
    const share = Math.log(E.valueOf(field, code) / low) / Math.log(high / low);
    const at = 4 * Math.min(1, Math.max(0, high > low ? share : 0));
    const [a, b] = [stops[Math.floor(at)], stops[Math.min(4, Math.floor(at) + 1)]];
    colors[code] = E.stop(a.map((value, i) => Math.round(value + (b[i] - value) * (at % 1))));
  }
  colors[1] = E.stop(stops[0]);
  return colors; // code 0, nothing measured, stays transparent
};

// The last column that begins at or before a step.
E.columnAt = (first, step) => {
  let [low, high] = [0, first.length - 1];
  while (low < high) {
    const middle = (low + high + 1) >> 1;
    if (first[middle] <= step) low = middle;
    else high = middle - 1;
  }
  return low;
};

E.paint = (u, heat, field) => {
  const { left, top, width, height } = u.bbox;
  const [columns, rows] = [heat.first.length, heat.rows.length];
  const [x0, x1, y0, y1] = [u.scales.x.min, u.scales.x.max, u.scales.y.min, u.scales.y.max];
  const [r0, r1] = [Math.max(0, Math.floor(y0)), Math.min(rows, Math.ceil(y1))];
  if (!(width > 0) || r1 <= r0) return;
  const image = new ImageData(Math.max(1, Math.round(width)), r1 - r0);
  const pixels = new Uint32Array(image.data.buffer);
  for (let x = 0; x < image.width; x++) {
    const [from, to] = [x0 + ((x1 - x0) * x) / image.width, x0 + ((x1 - x0) * (x + 1)) / image.width];
    if (to < heat.first[0] || from > heat.last[columns - 1]) continue;
    const a = E.columnAt(heat.first, from);
    const b = Math.max(a, E.columnAt(heat.first, to - 1e-9));
    for (let row = r0; row < r1; row++) {
      let code = 0; // of several steps in one pixel the largest is shown
      for (let column = a; column <= b; column++) code = Math.max(code, field.cells[row * columns + column]);
      pixels[(row - r0) * image.width + x] = u.colors[code];
    }
  }
  const canvas = E.el("canvas", { width: image.width, height: image.height });
  canvas.getContext("2d").putImageData(image, 0, 0);
  const tall = height / (y1 - y0);
  u.ctx.save();
  u.ctx.imageSmoothingEnabled = false;
  u.ctx.beginPath();
  u.ctx.rect(left, top, width, height);
  u.ctx.clip();
  u.ctx.drawImage(canvas, left, top + (r0 - y0) * tall, width, (r1 - r0) * tall);
  u.ctx.restore();
};

E.scaleBar = (field, ends) => {
  const canvas = E.el("canvas", { width: 254, height: 1 });
  const image = new ImageData(254, 1);
  const all = { low: ends[0], high: ends[1] };
  new Uint32Array(image.data.buffer).set(E.palette(all, ends).subarray(2));
  canvas.getContext("2d").putImageData(image, 0, 0);
  const least = (field.low < ends[0] ? "≤ " : "") + E.number(ends[0]);
  return E.el("span", { className: "scale" }, least, canvas, E.number(ends[1]));
};

// What fits beside a picture on a phone: "model.layers.3.mlp.down_proj" -> "3 down_proj"; of longer ones the middle goes.
E.brief = (name) => {
  const text = name.replace(/^.*?(\d+)\..*?([^.]+)$/, "$1 $2");
  return text.length > 14 ? `${text.slice(0, 7)}…${text.slice(-6)}` : text;
};

// Fills holder with the picture; pick(row) is called for a click on a row.
E.heatChart = (holder, heat, field, ends, title, pick) => {
  const rows = heat.rows.length;
  const tip = E.el("div", { className: "tip", hidden: true });
  const where = (u) => {
    const step = u.posToVal(u.cursor.left, "x");
    const row = Math.floor(u.posToVal(u.cursor.top, "y"));
    const column = E.columnAt(heat.first, step);
    return row < 0 || row >= rows || u.cursor.left < 0 || step < heat.first[0] - 1 ? null : { row, column };
  };
  const hover = (u) => {
    const cell = u.cursor.event || u.cursor.top >= 0 ? where(u) : null;
    tip.hidden = !cell || !u.hovered;
    if (tip.hidden) return;
    const code = field.cells[cell.row * heat.first.length + cell.column];
    const [first, last] = [heat.first[cell.column], heat.last[cell.column]];
    const steps = first === last ? `step ${first}` : `steps ${first}–${last}`;
    const value = code ? `${E.number(Number(E.valueOf(field, code).toPrecision(2)))}` : "not measured";
    tip.replaceChildren(E.el("b", {}, heat.rows[cell.row]), E.el("br"), `${steps}: ${value}`);
    const right = u.cursor.left > u.over.clientWidth / 2;
    tip.style.left = right ? "auto" : `${u.cursor.left + 14}px`;
    tip.style.right = right ? `${u.over.clientWidth - u.cursor.left + 14}px` : "auto";
    tip.style.top = `${Math.min(u.cursor.top + 14, u.over.clientHeight - 50)}px`;
  };
  const narrow = holder.clientWidth < 600;
  const labels = (u, ticks) => ticks.map((at) => heat.rows[Math.floor(at)] ?? "").map((name) => (narrow ? E.brief(name) : name));
  const options = {
    height: Math.min(640, Math.max(200, 60 + rows * 12)),
    legend: { show: false },
    scales: { x: E.xScale(), y: { dir: -1, auto: false, range: (u, min, max) => (min === null ? [0, rows] : [min, max]) } },
    axes: [
      E.axis({}),
      E.axis({
        size: narrow ? 112 : 215,
        grid: { show: false },
        splits: (u, i, min, max) => {
          const every = Math.max(1, Math.ceil((max - min) / (u.bbox.height / devicePixelRatio / 14)));
          const from = Math.max(0, Math.floor(min));
          return Array.from({ length: Math.ceil((Math.min(rows, max) - from) / every) }, (_, j) => from + j * every + 0.5);
        },
        values: labels,
        font: "11px system-ui, sans-serif",
      }),
    ],
    series: [{}, { paths: () => null, points: { show: false } }],
    cursor: { sync: E.SYNC, drag: { x: true, y: true, uni: 12, dist: 6 }, points: { show: false } },
    hooks: E.hooks({ draw: [(u) => E.paint(u, heat, field)], setCursor: [hover] }),
  };
  const data = [heat.last, heat.last.map(() => rows / 2)];
  const plot = E.place(holder, options, data, E.limits);
  plot.colors = E.palette(field, ends);
  plot.over.append(tip);
  plot.over.addEventListener("mouseenter", () => (plot.hovered = true));
  plot.over.addEventListener("mouseleave", () => ((plot.hovered = false), (tip.hidden = true)));
  plot.whole = () => plot.setScale("y", { min: 0, max: rows });
  plot.over.addEventListener("dblclick", plot.whole);
  plot.over.addEventListener("click", () => {
    const cell = where(plot);
    if (cell) pick(cell.row);
  });
  plot.over.setAttribute("role", "img");
  plot.over.setAttribute("aria-label", title);
  plot.whole();
  return plot;
};

// The numbers of one row of a picture, as a line.
E.rowLine = (heat, name, row) => {
  if (!heat.fields[name]) return { x: [], y: [] };
  const field = E.decode(heat.fields[name]);
  const cells = Array.from(field.cells.subarray(row * heat.first.length, (row + 1) * heat.first.length));
  return { x: heat.last, y: cells.map((code) => E.valueOf(field, code)) };
};
