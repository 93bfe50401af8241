"use strict";
// Line charts over the steps. All of them show the same stretch of steps and share their cursor.

E.LEFT = 64; // room for the labels of the left axis
E.SYNC = { key: "steps", setSeries: false, scales: ["x", null] }; // the charts share the steps and not what is upwards

E.show = (min, max) => {
  const [low, high] = E.limits;
  const width = Math.min(Math.max(max - min, 2), high - low);
  const start = Math.min(Math.max(min, low), high - width);
  for (const chart of E.charts) chart.setScale("x", { min: start, max: start + width });
};

// A new chart shows the steps that the others do.
E.look = (chart) => {
  const [min, max] = E.range ?? E.limits;
  chart?.setScale("x", { min, max });
};

E.axis = (extra) => ({
  stroke: E.color("soft"),
  grid: { stroke: E.color("line"), width: 1 },
  ticks: { stroke: E.color("line"), width: 1 },
  font: "12px system-ui, sans-serif",
  ...extra,
});

E.place = (holder, options, data, limits) => {
  const width = () => Math.max(200, holder.clientWidth);
  const plot = new uPlot({ width: width(), ...options }, data, holder);
  plot.limits = limits;
  plot.holder = holder;
  E.charts.push(plot);
  new ResizeObserver(() => {
    if (holder.isConnected && Math.abs(width() - plot.width) > 1) plot.setSize({ width: width(), height: options.height });
  }).observe(holder);
  return plot;
};

E.xScale = () => ({ time: false, range: (u, min, max) => [min, max] });

// A zoom by hand reaches the other charts by uPlot's sync of the cursor; here it is remembered.
E.hooks = (more) => ({
  setScale: [(u, key) => key === "x" && u.limits && (E.range = [u.scales.x.min, u.scales.x.max])],
  ...more,
});

// lines: [{label, x, y, color, dash, dots}]; marks: [{step, color}] are drawn as ticks at the foot, and through the whole
// chart where they are few.
E.lineChart = (title, lines, { log = false, marks = [], wide = false, height = 230, about = null, id = "" } = {}) => {
  const there = lines.filter((line) => line.x && line.x.length);
  if (!there.length) return null;
  const holder = E.el("div", { className: "plot" });
  const section = E.section(title, wide, holder, about);
  if (id) section.id = id;
  const positive = (y) => (log ? y.map((value) => (value > 0 ? value : null)) : y);
  const data = uPlot.join(there.map((line) => [line.x, positive(line.y)]));
  const series = there.map((line) => ({
    label: line.label,
    stroke: line.color,
    width: line.dash ? 1.2 : 1.4,
    dash: line.dash,
    spanGaps: true,
    points: line.dots ? { show: true, size: 5, fill: line.color } : { show: false },
    value: (u, value) => E.number(value),
  }));
  const drawMarks = (u) => {
    const { left, top, width, height: tall } = u.bbox;
    const shown = marks.map((mark) => [u.valToPos(mark.step, "x", true), mark.color]).filter(([at]) => at >= left && at <= left + width);
    const foot = 10 * devicePixelRatio;
    u.ctx.save();
    for (const [at, color] of shown) {
      u.ctx.fillStyle = color;
      u.ctx.globalAlpha = 0.9;
      u.ctx.fillRect(Math.round(at) - 1, top + tall - foot, 2, foot);
      u.ctx.globalAlpha = 0.35;
      if (shown.length <= 60) u.ctx.fillRect(Math.round(at), top, 1, tall - foot);
    }
    u.ctx.restore();
  };
  const options = {
    height,
    scales: { x: E.xScale(), y: log ? { distr: 3 } : {} },
    axes: [E.axis({}), E.axis({ size: E.LEFT, values: (u, ticks) => ticks.map((v) => (v === null ? "" : E.tick(v))) })],
    series: [{ label: "step", value: (u, value) => E.number(value) }, ...series],
    legend: { markers: { width: 2, fill: (u, i) => u.series[i].stroke(u, i), dash: (u, i) => (u.series[i].dash ? "dashed" : "solid") } },
    cursor: { sync: E.SYNC, drag: { x: true, y: false, dist: 6 } },
    hooks: E.hooks({ draw: [drawMarks] }),
  };
  section.ready = () => E.place(holder, options, data, E.limits);
  return section;
};
