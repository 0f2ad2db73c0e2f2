"use strict";
// Tables: a click on a heading sorts, and a button copies what a spreadsheet pastes.
function textOf(cell) { return cell.dataset.value ?? cell.textContent; }

function sortBy(table, column, heading) {
  const up = heading.getAttribute("aria-sort") !== "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = [...table.tBodies[0].rows].map((row) => [textOf(row.cells[column]), row]);
  const numbers = rows.every(([text]) => text === "" || !Number.isNaN(Number(text)));
  rows.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is missing stays last
    const order = numbers ? Number(a) - Number(b) : a.localeCompare(b, undefined, { numeric: true });
    return up ? order : -order;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // A page that is opened as a file may have no clipboard of its own.
    const area = document.body.appendChild(document.createElement("textarea"));
    area.value = text;
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}

for (const box of document.querySelectorAll(".table")) {
  const table = box.querySelector("table");
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.textContent = heading.textContent;
    button.title = "Sort";
    heading.replaceChildren(button);
    const first = table.tBodies[0].rows[0]?.cells[column];
    heading.classList.toggle("words", Boolean(first?.textContent) && first.dataset.value === undefined);
    button.addEventListener("click", () => sortBy(table, column, heading));
  });
  const button = document.createElement("button");
  button.className = "copy";
  button.textContent = "Copy for a spreadsheet";
  button.addEventListener("click", async () => {
    // What a spreadsheet would take for a formula is pasted as text.
    const plain = (text) => text.replace(/[\t\r\n]+/g, " ");
    const safe = (text) => (/^[=+\-@]/.test(text) && Number.isNaN(Number(text)) ? "'" + text : text);
    const lines = [...table.rows].map((row) => [...row.cells].map((cell) => safe(plain(textOf(cell)))).join("\t"));
    await copy(lines.join("\n"));
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy for a spreadsheet"), 1500);
  });
  box.append(button);
}

// Pictures open in full size.
for (const link of document.querySelectorAll(".picture a")) {
  link.addEventListener("click", (event) => {
    event.preventDefault();
    const dialog = document.body.appendChild(document.createElement("dialog"));
    dialog.append(link.querySelector("img").cloneNode());
    dialog.addEventListener("click", () => dialog.close());
    dialog.addEventListener("close", () => dialog.remove());
    dialog.showModal();
  });
}

// Plots: points with intervals, or a path, on axes that zoom.
const LEFT = 62, TOP = 26, BOTTOM = 44, RIGHT = 14;
const APART = 17;  // pixels from a name to the next
const NAMED = 60;  // beyond so many rows some have their names beside them

function svg(kind, attributes, parent) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", kind);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return parent ? parent.appendChild(node) : node;
}

function ticks([low, high], count = 6) {
  const rough = (high - low) / count || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const fits = (size) => Math.floor(high / size + 1e-9) - Math.ceil(low / size - 1e-9) >= 1;  // two marks at least
  const sizes = [10, 5, 2, 1, 0.5, 0.2, 0.1].map((k) => k * unit);
  const step = sizes.filter((size) => size >= rough && fits(size)).at(-1) ?? sizes.find(fits) ?? rough;
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k <= high / step + 1e-9; k++) found.push(k * step);
  return found.map((value) => (Math.abs(value) < step * 1e-9 ? 0 : value));
}

function number(value, range) {
  const size = Math.max(Math.abs(range[0]), Math.abs(range[1]));
  const apart = Math.abs(range[1] - range[0]);
  const digits = Math.min(15, Math.max(3, 2 + Math.ceil(Math.log10(size / apart || 1))));
  if (value && (size < 1e-3 || size >= 1e6)) {
    const [part, power] = value.toExponential(Math.min(14, digits - 1)).split("e");
    return `${Number(part)}e${Number(power)}`;
  }
  return String(Number(value.toPrecision(digits)));
}

// Widths of letters as they are drawn. Letters that are drawn as one, such as accents or the signs of Hindi, stay together.
const PEN = document.createElement("canvas").getContext("2d");
const WIDTHS = new Map();
const TOGETHER = globalThis.Intl?.Segmenter && new Intl.Segmenter();

function lettersOf(text) {
  if (!TOGETHER || /^[ -~]*$/.test(text)) return [...text];
  return [...TOGETHER.segment(text)].map((part) => part.segment);
}

function widthOf(letter) {
  if (!WIDTHS.has(letter)) {
    PEN.font = "12px system-ui, sans-serif";
    WIDTHS.set(letter, PEN.measureText(letter).width);
  }
  return WIDTHS.get(letter);
}

function fitting(letters, room) {
  let count = 0;
  while (count < letters.length && (room -= widthOf(letters[count])) >= 0) count++;
  return count;
}

function head(letters, room) {
  if (fitting(letters, room) === letters.length) return letters.join("");
  return `${letters.slice(0, fitting(letters, room - widthOf("…"))).join("")}…`;
}

function ends(letters, room) {
  if (fitting(letters, room) === letters.length) return letters.join("");
  const half = (room - widthOf("…")) / 2, back = [...letters].reverse();
  return `${letters.slice(0, fitting(letters, half)).join("")}…${back.slice(0, fitting(back, half)).reverse().join("")}`;
}

// The names of rows, shortened in the way that leaves most of them different.
function shortened(names, room) {
  let same = 0;
  while (names.length > 1 && same < names[0].length && names.every((name) => name[same] === names[0][same])) same++;
  const ways = [(name) => head(name, room), (name) => ends(name, room)];
  if (same > 3) ways.push((name) => head(["…", ...name.slice(same - 1)], room));
  const tried = ways.map((way) => names.map(way));
  return tried.reduce((best, next) => (new Set(next).size > new Set(best).size ? next : best));
}

function bounds(values, room) {
  const known = values.filter((value) => value !== null);
  let low = Math.min(...known), high = Math.max(...known);
  const pad = (high - low) * room || Math.abs(high) * 0.1 || 1;
  return [low - pad, high + pad];
}

function draw(figure, plot) {
  const WIDTH = Math.max(300, Math.min(800, figure.clientWidth));  // letters keep their size on a narrow screen
  const rows = plot.rows;  // names of the rows, where the second axis has names
  const height = !rows ? 380 : rows.length > NAMED ? 720 : TOP + BOTTOM + APART * Math.max(rows.length + 1, 4);
  const names = rows?.map(lettersOf);
  const widest = names && Math.max(...names.map((name) => name.reduce((sum, letter) => sum + widthOf(letter), 0)));
  const left = rows ? Math.min(0.35 * WIDTH, Math.ceil(widest) + 14) : LEFT + 10;
  const labels = names && shortened(names, left - 12);
  const box = { x0: left, x1: WIDTH - RIGHT, y0: height - BOTTOM, y1: TOP };
  const all = {
    x: bounds([...plot.x, ...(plot.low ?? []), ...(plot.high ?? []), ...(plot.zero ? [0] : [])], 0.04),
    y: rows ? [-1, rows.length] : bounds(plot.y, 0.06),
  };
  let view = { x: [...all.x], y: [...all.y] };
  const canvas = svg("svg", { viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": plot.title });
  const clip = `clip-${plot.key}`;
  const hole = svg("clipPath", { id: clip }, svg("defs", {}, canvas));
  svg("rect", { x: box.x0, y: box.y1, width: box.x1 - box.x0, height: box.y0 - box.y1 }, hole);
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  figure.append(canvas, tip);
  const px = (value) => box.x0 + ((value - view.x[0]) / (view.x[1] - view.x[0])) * (box.x1 - box.x0);
  const py = (value) => box.y0 - ((value - view.y[0]) / (view.y[1] - view.y[0])) * (box.y0 - box.y1);
  let marks = [];

  function render() {
    canvas.querySelectorAll(":scope > :not(defs)").forEach((node) => node.remove());
    const axes = svg("g", {}, canvas), inside = svg("g", { "clip-path": `url(#${clip})` }, canvas);
    svg("path", { class: "axis", fill: "none", d: `M${box.x0},${box.y1}V${box.y0}H${box.x1}` }, axes);
    for (const value of ticks(view.x, WIDTH > 500 ? 6 : 3)) {
      const label = svg("text", { x: px(value), y: box.y0 + 17, "text-anchor": "middle" }, axes);
      label.textContent = number(value, view.x);
      svg("path", { class: "axis", d: `M${px(value)},${box.y0}v4` }, axes);
    }
    svg("text", { x: (box.x0 + box.x1) / 2, y: height - 6, "text-anchor": "middle" }, axes).textContent = plot.xlabel;
    if (rows) {
      const first = Math.max(0, Math.ceil(view.y[0])), last = Math.min(rows.length - 1, Math.floor(view.y[1]));
      const step = Math.ceil((0.98 * APART) / (py(0) - py(1)));
      for (let i = last; i >= first; i -= step) {
        svg("text", { x: box.x0 - 6, y: py(i) + 4, "text-anchor": "end" }, axes).textContent = labels[i];
        if (step > 1) svg("path", { class: "axis", d: `M${box.x0},${py(i)}h-4` }, axes);
      }
    } else {
      for (const value of ticks(view.y)) {
        svg("text", { x: box.x0 - 8, y: py(value) + 4, "text-anchor": "end" }, axes).textContent = number(value, view.y);
        svg("path", { class: "axis", d: `M${box.x0},${py(value)}h-4` }, axes);
      }
    }
    svg("text", { x: 4, y: 14 }, axes).textContent = head(lettersOf(plot.ylabel), WIDTH - 12);
    if (plot.zero) svg("path", { class: "ref", d: `M${px(0)},${box.y1}V${box.y0}` }, inside);
    if (plot.level) svg("path", { class: "ref", d: `M${box.x0},${py(0)}H${box.x1}` }, inside);
    if (plot.diagonal) {
      const [a, b] = plot.diagonal;
      svg("path", { class: "ref", d: `M${px(view.x[0])},${py(a + b * view.x[0])}L${px(view.x[1])},${py(a + b * view.x[1])}` }, inside);
    }
    if (plot.path) {
      svg("path", { class: "path", d: plot.x.map((x, i) => `${i ? "L" : "M"}${px(x)},${py(plot.y[i])}`).join("") }, inside);
    }
    const radius = plot.x.length > 1000 ? 1.5 : plot.x.length > 200 ? 2.5 : 3.5;
    const apart = rows ? (box.y0 - box.y1) / (view.y[1] - view.y[0]) : 4;  // between two rows, so that intervals stay apart
    const width = Math.min(2, Math.max(0.15, 0.6 * apart));
    marks = plot.x.map((x, i) => {
      const y = rows ? i : plot.y[i];
      if (x === null || y < view.y[0] || y > view.y[1]) return null;
      if (plot.low && plot.low[i] !== null) {
        svg("path", { class: "interval", "stroke-width": width, d: `M${px(plot.low[i])},${py(y)}H${px(plot.high[i])}` }, inside);
      }
      return svg("circle", { class: "point", cx: px(x), cy: py(y), r: radius }, inside);
    });
  }

  function at(event) {
    const area = canvas.getBoundingClientRect(), scale = WIDTH / area.width;
    return [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
  }

  function zoom(factor, [cx, cy]) {
    const fx = (cx - box.x0) / (box.x1 - box.x0), fy = (box.y0 - cy) / (box.y0 - box.y1);
    for (const [axis, share] of [["x", fx], ["y", fy]]) {
      if (axis === "x" && rows && rows.length > NAMED) continue;  // a long list is opened along its rows
      const [low, high] = view[axis], middle = low + share * (high - low);
      view[axis] = [middle + (low - middle) * factor, middle + (high - middle) * factor];
    }
    render();
  }

  let from = null;
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return;
    event.preventDefault();
    zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => { from = at(event); canvas.setPointerCapture(event.pointerId); });
  canvas.addEventListener("pointerup", () => (from = null));
  canvas.addEventListener("dblclick", () => { view = { x: [...all.x], y: [...all.y] }; render(); });
  canvas.addEventListener("pointerleave", () => (tip.hidden = true));
  canvas.addEventListener("pointermove", (event) => {
    const [cx, cy] = at(event);
    if (from) {
      const dx = ((from[0] - cx) / (box.x1 - box.x0)) * (view.x[1] - view.x[0]);
      const dy = ((cy - from[1]) / (box.y0 - box.y1)) * (view.y[1] - view.y[0]);
      view = { x: view.x.map((v) => v + dx), y: view.y.map((v) => v + dy) };
      from = [cx, cy];
      render();
      return;
    }
    let near = -1, least = 18 ** 2;
    marks.forEach((mark, i) => {
      if (!mark) return;
      const away = (rows ? 0.05 : 1) * (mark.cx.baseVal.value - cx) ** 2 + (mark.cy.baseVal.value - cy) ** 2;
      if (away < least) [near, least] = [i, away];
    });
    canvas.querySelector(".on")?.classList.remove("on");
    tip.hidden = near < 0;
    if (near < 0) return;
    marks[near].classList.add("on");
    const name = document.createElement("bdi");  // numbers after an Arabic name keep their order
    name.textContent = (rows ?? plot.labels)[near];
    tip.replaceChildren(name, `: ${plot.says[near]}`);
    const scale = canvas.getBoundingClientRect().width / WIDTH;
    tip.style.top = `${canvas.offsetTop + marks[near].cy.baseVal.value * scale + 10}px`;
    tip.style.left = `${Math.max(0, Math.min(marks[near].cx.baseVal.value * scale, figure.clientWidth - tip.offsetWidth - 4))}px`;
  });
  const tools = document.createElement("div");
  figure.prepend(tools);
  tools.className = "tools";
  const middle = [(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2];
  for (const [text, name, action] of [
    ["+", "Zoom in", () => zoom(0.7, middle)],
    ["−", "Zoom out", () => zoom(1 / 0.7, middle)],
    ["All", "See all", () => { view = { x: [...all.x], y: [...all.y] }; render(); }],
  ]) {
    const button = tools.appendChild(document.createElement("button"));
    button.textContent = text;
    button.title = name;
    button.addEventListener("click", action);
  }
  render();
}

const PLOTS = JSON.parse(document.getElementById("plots").textContent);
for (const figure of document.querySelectorAll("[data-plot]")) draw(figure, PLOTS[figure.dataset.plot]);
