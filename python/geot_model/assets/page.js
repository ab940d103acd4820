"use strict";
// Everything is drawn from the JSON in #data (see geot_model/page.py). Text goes into the page as
// text only, so that names cannot become markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const ALL = -1; // layers, heads

  const RED = [[244, 165, 130], [214, 96, 77], [178, 24, 43]];
  const BLUE = [[146, 197, 222], [67, 147, 195], [33, 102, 172]];
  const WHITE = [247, 247, 247];
  const CIVIDIS = [
    [0, 34, 78], [26, 56, 111], [66, 78, 108], [98, 101, 112], [125, 124, 120], [155, 149, 119],
    [188, 175, 111], [222, 203, 93], [254, 232, 56],
  ];
  const AMBER = [[255, 255, 255], [250, 215, 160], [230, 140, 20]];
  // Elements in pale colours: strong ones are for relations.
  const ELEMENTS = {
    H: "#ffffff", C: "#8a8a8a", N: "#a9b8ff", O: "#ffa99c", F: "#b6e8a8", Cl: "#8fdc8f",
    Br: "#c98f7a", I: "#b98fd0", S: "#f2dd7c", P: "#f4c07a", B: "#f0c9b8", Si: "#d8c9a8",
  };
  const OTHER_ELEMENT = "#d3b3cf";
  const ATOM_EDGE = "#555555";

  const state = {
    molecule: 0, method: 0, target: 0, layer: ALL, head: ALL, count: data.pairs, among: "all",
    names: "paired", colours: "element", marked: null, cursor: null,
  };
  let viewer = null;
  let shown = null; // what the last `update` computed

  // Colours and numbers

  function ramp(stops, t) {
    const at = Math.min(Math.max(t, 0), 1) * (stops.length - 1);
    const low = Math.min(Math.floor(at), stops.length - 2);
    const mixed = stops[low].map((c, k) => Math.round(c + (at - low) * (stops[low + 1][k] - c)));
    return `rgb(${mixed.join(",")})`;
  }

  function pairColour(value, top) {
    return ramp(value < 0 ? BLUE : RED, Math.abs(value) / top);
  }

  function cellColour(value, top, signed) {
    if (!signed) return ramp(CIVIDIS, value / top);
    return ramp([WHITE, ...(value < 0 ? BLUE : RED)], Math.abs(value) / top);
  }

  function number(value, signed = false) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    const text = size >= 1e-3 && size < 999.5 ? size.toPrecision(3) : size.toExponential(2);
    const sign = value < 0 ? "−" : signed ? "+" : "";
    return sign + text;
  }

  function minus(text) {
    return text.replace(/^-/, "−");
  }

  // Elements of the page

  function element(tag, properties = {}, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function setOptions(select, names, first = 0) {
    select.replaceChildren(
      ...names.map((text, k) => element("option", { value: String(k + first), textContent: text })),
    );
  }

  function fillTable(table, head, rows) {
    const cells = (tag, texts) => texts.map(([content, kind]) => {
      const cell = element(tag, { className: kind ?? "" }, content);
      if (tag === "th") cell.scope = "col";
      return cell;
    });
    const body = rows.map((row) => element("tr", {}, ...cells("td", row)));
    const top = element("tr", {}, ...cells("th", head));
    table.replaceChildren(element("thead", {}, top), element("tbody", {}, ...body));
    return body;
  }

  // Maps

  async function bytes(text) {
    const packed = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    const plain = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(plain).arrayBuffer();
  }

  async function unpacked(map) {
    if (!map.numbers) {
      map.numbers = new Int8Array(await bytes(map.packed));
      map.total = new Float32Array(await bytes(map.aggregate));
    }
    return map;
  }

  function mapOf(molecule) {
    const method = data.methods[state.method];
    return molecule.maps[method.first + (method.targets.length ? state.target : 0)];
  }

  // A [n * n] of some layers and heads: their sum, or their mean.
  function aggregated(map, n) {
    if (state.layer === ALL && state.head === ALL) return Float64Array.from(map.total);
    const heads = map.scales[0].length;
    const out = new Float64Array(n * n);
    let used = 0;
    for (let l = 0; l < map.scales.length; l++) {
      if (state.layer !== ALL && state.layer !== l) continue;
      for (let h = 0; h < heads; h++) {
        if (state.head !== ALL && heads > 1 && state.head !== h) continue;
        const start = (l * heads + h) * n * n;
        for (let k = 0; k < n * n; k++) out[k] += map.scales[l][h] * map.numbers[start + k];
        used += 1;
      }
    }
    if (data.methods[state.method].mean) for (let k = 0; k < n * n; k++) out[k] /= used;
    return out;
  }

  function ranked(molecule, a) {
    const n = molecule.labels.length;
    const pairs = [];
    for (let i = 0; i < n; i++) {
      for (let j = i + 1; j < n; j++) {
        const value = (a[i * n + j] + a[j * n + i]) / 2;
        const far = molecule.apart[i * n + j];
        const heavy = molecule.elements[i] !== "H" && molecule.elements[j] !== "H";
        if (value === 0 || (state.among === "apart" && far === 1)) continue;
        if (state.among === "heavy" && !heavy) continue;
        pairs.push({ i, j, value, there: a[i * n + j], back: a[j * n + i], far });
      }
    }
    return pairs.sort((p, q) => Math.abs(q.value) - Math.abs(p.value));
  }

  function distance(molecule, i, j) {
    return Math.hypot(...molecule.positions[i].map((x, k) => x - molecule.positions[j][k]));
  }

  function sums(molecule, a) {
    const n = molecule.labels.length;
    return molecule.labels.map((_, i) => {
      let sum = 0;
      for (let j = 0; j < n; j++) if (j !== i) sum += Math.abs(a[i * n + j] + a[j * n + i]) / 2;
      return sum;
    });
  }

  // Structure

  function makeViewer() {
    try {
      viewer = $3Dmol.createViewer(byId("viewer"), { backgroundColor: "white", antialias: true });
    } catch {
      viewer = null;
    }
    if (!viewer) {
      byId("viewer").textContent =
        "This browser cannot draw in 3-D (no WebGL). The tables and the map show everything else.";
    }
  }

  function drawStructure(fresh) {
    if (!viewer) return;
    const { molecule, pairs, atoms } = shown;
    if (fresh) {
      viewer.removeAllModels();
      const model = viewer.addModel();
      model.addAtoms(molecule.labels.map((_, i) => {
        const bonds = molecule.bonds.filter(([a, b]) => a === i || b === i);
        return {
          elem: molecule.elements[i], serial: i, index: i, ...placeOf(molecule, i),
          bonds: bonds.map(([a, b]) => (a === i ? b : a)),
          bondOrder: bonds.map(([, , order]) => order),
        };
      }));
    }
    const most = Math.max(...atoms, 1e-300);
    for (let i = 0; i < molecule.labels.length; i++) {
      const colour = state.colours === "strength" ? ramp(AMBER, atoms[i] / most)
        : ELEMENTS[molecule.elements[i]] ?? OTHER_ELEMENT;
      const radius = molecule.elements[i] === "H" ? 0.22 : 0.34;
      viewer.setStyle({ serial: i }, {
        stick: { radius: 0.07, color: ATOM_EDGE }, sphere: { radius, color: colour },
      });
    }
    drawRelations();
    if (fresh) {
      viewer.zoomTo();
      viewer.zoom(1.15);
    }
    viewer.render();
  }

  function placeOf(molecule, i) {
    const [x, y, z] = molecule.positions[i];
    return { x, y, z };
  }

  function drawRelations() {
    const { molecule, pairs, top } = shown;
    viewer.removeAllShapes();
    viewer.removeAllLabels();
    for (const { i, j, value } of pairs) {
      const dashes = value < 0 ? Math.max(2, Math.round(distance(molecule, i, j) / 0.4)) : 1;
      const at = (share) => {
        const [x, y, z] = molecule.positions[i].map(
          (from, k) => from + share * (molecule.positions[j][k] - from));
        return { x, y, z };
      };
      for (let dash = 0; dash < dashes; dash++) {
        viewer.addCylinder({
          start: at(dashes > 1 ? (dash + 0.2) / dashes : 0),
          end: at(dashes > 1 ? (dash + 0.8) / dashes : 1),
          radius: 0.05 + (0.15 * Math.abs(value)) / top,
          color: pairColour(value, top), alpha: 0.75, fromCap: 1, toCap: 1,
        });
      }
    }
    const named = new Set(state.names === "paired" ? pairs.flatMap(({ i, j }) => [i, j])
      : state.names === "all" ? molecule.labels.keys() : []);
    if (state.marked) state.marked.forEach((i) => named.add(i));
    for (const i of named) {
      const marked = state.marked?.includes(i);
      viewer.addLabel(molecule.labels[i], {
        position: placeOf(molecule, i), fontSize: 13, fontColor: "black", inFront: true, alignment: "center",
        backgroundColor: marked ? "#ffd24d" : "white", backgroundOpacity: marked ? 1 : 0.65,
        borderThickness: 0, padding: 1,
      });
    }
  }

  function drawLegend() {
    const { method, pairs, top, unit } = shown;
    const parts = [];
    const line = (value) => {
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("width", "46");
      svg.setAttribute("height", "14");
      svg.setAttribute("aria-hidden", "true");
      const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
      const attributes = {
        x1: 2, x2: 44, y1: 7, y2: 7, stroke: pairColour(value, top),
        "stroke-width": 3 + (8 * Math.abs(value)) / top,
        "stroke-dasharray": value < 0 ? "6 4" : "none",
      };
      for (const [name, content] of Object.entries(attributes)) stroke.setAttribute(name, content);
      svg.append(stroke);
      return svg;
    };
    for (const sign of [1, -1]) {
      const same = pairs.filter(({ value }) => Math.sign(value) === sign).map((p) => p.value);
      if (!same.length) continue;
      const what = !method.signed ? "strength"
        : sign > 0 ? "raises the prediction (solid)" : "lowers the prediction (dashed)";
      const ends = [same.at(-1), same[0]].map((value) => number(value, method.signed));
      const range = same.length > 1 ? `${ends[0]} to ${ends[1]}` : ends[1];
      parts.push(element("span", {}, line(same[0]), `${what}: ${range} ${unit}`));
    }
    if (state.colours === "strength") {
      parts.push(element("span", {}, "Atoms: white to brown, the sum of the strengths of all pairs of an atom"));
    }
    byId("legend").replaceChildren(...(parts.length ? parts : ["No pairs are drawn."]));
    const { molecule } = shown;
    const list = pairs.map(({ i, j, value }) =>
      `${molecule.labels[i]} and ${molecule.labels[j]} ${number(value, method.signed)}`);
    byId("viewer").setAttribute("aria-label",
      `${molecule.name} in 3-D with ${pairs.length} pairs: ${list.join("; ")}`);
  }

  // Tables

  function drawPredictions() {
    const { molecule } = shown;
    const known = molecule.predictions.some((one) => one.known !== null);
    fillTable(
      byId("predictions"),
      [["Property", "text"], ["Predicted"], ...(known ? [["Known"]] : []), ["Unit", "text"]],
      molecule.predictions.map((one) => [
        [one.target, "text"], [minus(one.value)], ...(known ? [[minus(one.known ?? "")]] : []),
        [one.unit, "text"],
      ]),
    );
  }

  function drawPairs() {
    const { molecule, method, pairs, unit } = shown;
    const rows = fillTable(
      byId("pairs"),
      [["Rank"], ["Atoms i – j", "text"], ["Pair"], ["Aij"], ["Aji"], ["Å"], ["Bonds"]],
      pairs.map(({ i, j, value, there, back, far }, rank) => {
        const names = element("button", { type: "button" },
          `${molecule.labels[i]} – ${molecule.labels[j]}`);
        return [
          [String(rank + 1)], [names, "text"],
          ...[value, there, back].map((x) => [number(x, method.signed)]),
          [distance(molecule, i, j).toFixed(2)], [far < 0 ? "no path" : String(far)],
        ];
      }),
    );
    const of = unit && ` in ${unit}`;
    byId("pairs").createCaption().textContent = `Pair: (Aij + Aji) / 2${of}, which ranks the pairs. ` +
      "Å: distance. Bonds: how many lie between the atoms.";
    rows.forEach((row, rank) => {
      const { i, j } = pairs[rank];
      const marked = state.marked?.[0] === i && state.marked?.[1] === j;
      row.setAttribute("aria-current", String(Boolean(marked)));
      row.addEventListener("click", () => {
        mark(marked ? null : [i, j]);
        byId("pairs").tBodies[0].rows[rank].querySelector("button").focus();
      });
    });
  }

  function mark(pair) {
    state.marked = pair;
    state.cursor = pair;
    drawPairs();
    drawMap();
    if (viewer) {
      drawRelations();
      viewer.render();
    }
  }

  // Heat map

  function layOut(n) {
    const cell = Math.min(Math.max(Math.floor(480 / n), 13), 36);
    const font = Math.min(cell - 1, 13);
    const margin = 6 + 3 * font;
    const bar = 34;
    return { cell, font, margin, width: margin + n * cell + 8, height: margin + n * cell + 12 + bar };
  }

  function drawMap() {
    const { molecule, a, limit, method, unit } = shown;
    const n = molecule.labels.length;
    const { cell, font, margin, width, height } = layOut(n);
    const canvas = byId("map");
    const ratio = window.devicePixelRatio || 1;
    canvas.width = Math.ceil(width * ratio);
    canvas.height = Math.ceil(height * ratio);
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const pen = canvas.getContext("2d");
    pen.scale(ratio, ratio);
    pen.font = `${font}px system-ui, sans-serif`;
    pen.textBaseline = "middle";
    for (let i = 0; i < n; i++) {
      for (let j = 0; j < n; j++) {
        pen.fillStyle = cellColour(a[i * n + j], limit, method.signed);
        pen.fillRect(margin + j * cell, margin + i * cell, cell, cell);
      }
      pen.fillStyle = "#1a1a1a";
      pen.textAlign = "right";
      pen.fillText(molecule.labels[i], margin - 4, margin + (i + 0.5) * cell);
      pen.save();
      pen.translate(margin + (i + 0.5) * cell, margin - 4);
      pen.rotate(-Math.PI / 2);
      pen.textAlign = "left";
      pen.fillText(molecule.labels[i], 0, 0);
      pen.restore();
    }
    pen.strokeStyle = "#888";
    pen.strokeRect(margin - 0.5, margin - 0.5, n * cell + 1, n * cell + 1);
    if (state.cursor) {
      const [i, j] = state.cursor;
      for (const [colour, inset] of [["#000", 0.5], ["#fff", 2]]) {
        pen.strokeStyle = colour;
        pen.lineWidth = 1.5;
        const side = cell - 2 * inset;
        pen.strokeRect(margin + j * cell + inset, margin + i * cell + inset, side, side);
      }
    }
    drawBar(pen, margin, margin + n * cell + 12, Math.max(Math.min(n * cell, 300), 150));
    canvas.setAttribute("aria-label", `Map of ${method.name} between ${n} atoms, from ` +
      `${number(shown.least, method.signed)} to ${number(shown.largest, method.signed)} ${unit}`);
    const [i, j] = state.cursor ?? [];
    byId("cell").textContent = state.cursor
      ? `${molecule.labels[i]} from ${molecule.labels[j]}: ` +
        `${number(a[i * n + j], method.signed)} ${unit}`
      : "\u00a0";
  }

  function drawBar(pen, x, y, width) {
    const { limit, method } = shown;
    for (let k = 0; k < width; k++) {
      const share = k / (width - 1);
      pen.fillStyle = cellColour(method.signed ? (2 * share - 1) * limit : share * limit,
        limit, method.signed);
      pen.fillRect(x + k, y, 1.5, 9);
    }
    pen.fillStyle = "#1a1a1a";
    pen.font = "12px system-ui, sans-serif";
    const more = shown.over ? "≥ " : "";
    pen.textAlign = "left";
    pen.fillText(method.signed ? number(-limit) : "0", x, y + 19);
    pen.textAlign = "right";
    pen.fillText(more + number(limit, method.signed), x + width, y + 19);
  }

  function cellAt(event) {
    const n = shown.molecule.labels.length;
    const { cell, margin } = layOut(n);
    const box = byId("map").getBoundingClientRect();
    const [i, j] = [event.clientY - box.top, event.clientX - box.left]
      .map((at) => Math.floor((at - margin) / cell));
    return i >= 0 && j >= 0 && i < n && j < n ? [i, j] : null;
  }

  // What depends on what

  async function update({ fresh = false } = {}) {
    const molecule = data.molecules[state.molecule];
    const method = data.methods[state.method];
    const map = mapOf(molecule);
    busy(true);
    try {
      await unpacked(map);
    } catch {
      busy(false);
      complain("This browser is too old to unpack the maps (it lacks DecompressionStream).");
      return;
    }
    if (molecule !== data.molecules[state.molecule] || map !== mapOf(molecule)) return;
    const n = molecule.labels.length;
    const a = aggregated(map, n);
    const between = a.filter((_, k) => k % (n + 1) !== 0).map(Math.abs);
    const limit = between.reduce((x, y) => Math.max(x, y), 0) ||
      a.reduce((x, y) => Math.max(x, Math.abs(y)), 0) || 1;
    const pairs = ranked(molecule, a).slice(0, state.count);
    shown = {
      molecule, method, a, limit, pairs, atoms: sums(molecule, a),
      least: a.reduce((x, y) => Math.min(x, y), Infinity),
      largest: a.reduce((x, y) => Math.max(x, y), -Infinity),
      over: a.some((x) => Math.abs(x) > limit),
      top: pairs.length ? Math.abs(pairs[0].value) : 1,
      unit: method.targets.length ? method.targets[state.target].unit : "",
    };
    const heads = map.scales[0].length;
    byId("head").disabled = heads === 1 && data.heads > 1;
    byId("target").disabled = method.targets.length < 2;
    drawPredictions();
    drawPairs();
    drawMap();
    drawLegend();
    drawMeaning();
    drawStructure(fresh);
    busy(false);
  }

  function busy(is) {
    document.querySelector("main").setAttribute("aria-busy", String(is));
  }

  function drawMeaning() {
    const { method } = shown;
    const property = method.targets.length ? method.targets[state.target].name : "";
    byId("formula").textContent = `${method.name}: A = ${method.formula}` +
      (property ? `, y: ${property}` : "");
    byId("explanation").textContent = method.meaning;
  }

  function complain(text) {
    byId("problem").textContent = text;
    byId("problem").hidden = false;
  }

  function choose(molecule) {
    state.molecule = molecule;
    state.marked = state.cursor = null;
    byId("molecule").value = String(molecule);
    byId("previous").disabled = molecule === 0;
    byId("next").disabled = molecule === data.molecules.length - 1;
    const n = data.molecules[molecule].labels.length;
    byId("count").max = String((n * (n - 1)) / 2);
    return update({ fresh: true });
  }

  function turn(event) {
    const step = 10;
    const turns = {
      ArrowLeft: [-step, "y"], ArrowRight: [step, "y"], ArrowUp: [-step, "x"], ArrowDown: [step, "x"],
    };
    if (!viewer || event.ctrlKey || event.metaKey || event.altKey) return;
    if (turns[event.key]) viewer.rotate(...turns[event.key]);
    else if (event.key === "+") viewer.zoom(1.2);
    else if (event.key === "-") viewer.zoom(1 / 1.2);
    else if (event.key === "0") {
      viewer.setView([0, 0, 0, 0, 0, 0, 0, 1]);
      viewer.zoomTo();
      viewer.zoom(1.15);
    } else return;
    event.preventDefault();
    viewer.render();
  }

  function moveCursor(event) {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (!steps[event.key] || !shown) return;
    const n = shown.molecule.labels.length;
    const from = state.cursor ?? [0, 0];
    const step = state.cursor ? steps[event.key] : [0, 0];
    state.cursor = from.map((at, k) => Math.min(Math.max(at + step[k], 0), n - 1));
    event.preventDefault();
    drawMap();
  }

  function listen() {
    const numbers = { method: 0, target: 0, layer: 0, head: 0 };
    for (const name of Object.keys(numbers)) {
      byId(name).addEventListener("change", (event) => {
        state[name] = Number(event.target.value);
        state.marked = null;
        update();
      });
    }
    for (const name of ["among", "names", "colours"]) {
      byId(name).addEventListener("change", (event) => {
        state[name] = event.target.value;
        update();
      });
    }
    byId("count").addEventListener("input", (event) => {
      const count = Math.floor(Number(event.target.value));
      if (event.target.value === "" || !(count >= 0)) return;
      state.count = count;
      update();
    });
    byId("controls").addEventListener("submit", (event) => event.preventDefault());
    byId("molecule").addEventListener("change", (event) => choose(Number(event.target.value)));
    byId("previous").addEventListener("click", () => choose(state.molecule - 1));
    byId("next").addEventListener("click", () => choose(state.molecule + 1));
    byId("viewer").addEventListener("keydown", turn);
    byId("map").addEventListener("keydown", moveCursor);
    for (const kind of ["mousemove", "click"]) {
      byId("map").addEventListener(kind, (event) => {
        const at = cellAt(event);
        if (at && String(at) !== String(state.cursor)) {
          state.cursor = at;
          drawMap();
        }
      });
    }
  }

  function start() {
    setOptions(byId("molecule"), data.molecules.map((one) => `${one.name} (${one.formula})`));
    setOptions(byId("method"), data.methods.map((one) => one.name));
    const mapped = data.methods.find((method) => method.targets.length)?.targets ?? [];
    setOptions(byId("target"), mapped.map((target) => target.name));
    const numbered = (what, count) =>
      ["all", ...Array.from({ length: count }, (_, k) => `${what} ${k + 1}`)];
    setOptions(byId("layer"), numbered("layer", data.layers), ALL);
    setOptions(byId("head"), numbered("head", data.heads), ALL);
    state.method = data.method;
    state.target = data.target;
    byId("target").value = String(data.target);
    byId("method").value = String(data.method);
    byId("count").value = String(data.pairs);
    byId("precision").textContent = data.precision;
    byId("problems").replaceChildren(
      ...data.problems.map((text) => element("li", { textContent: text })),
    );
    byId("pages").replaceChildren(...data.pages.map(({ name, file, here }) => {
      const link = element("a", { href: file, textContent: name });
      if (here) link.setAttribute("aria-current", "page");
      return link;
    }));
    makeViewer();
    listen();
    choose(0);
  }

  start();
})();
