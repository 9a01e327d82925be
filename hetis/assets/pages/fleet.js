// The fleet page: draws each event of /fleet/events. No libraries; nothing is kept but the last five minutes.
"use strict";

const WINDOW_SECONDS = 300;
const MAX_LOG_LINES = 40;
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b5a800", "#7f7f7f"];
const KINDS = { dispatch: "#0072b2", migration: "#009e73", rebalance: "#cc79a7", relief: "#e69f00", preemption: "#d55e00" };
const SVG = "http://www.w3.org/2000/svg";

const history = []; // the last messages, for the curves
const happened = []; // events of the last five minutes

const byId = (id) => document.getElementById(id);

function deviceColour(rank) {
  return rank < PALETTE.length ? PALETTE[rank] : `hsl(${(rank * 137.5) % 360} 60% 50%)`;
}

function element(tag, attributes = {}, text = null, namespace = null) {
  const made = namespace ? document.createElementNS(namespace, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== null) made.textContent = text;
  return made;
}

const setText = (id, text) => {
  if (byId(id).textContent !== text) byId(id).textContent = text;
};

// --- numbers ---------------------------------------------------------------------------------------------------------

const rounded = (value) => (value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2));
const milliseconds = (value) => (value === null ? "–" : value >= 10000 ? `${(value / 1000).toFixed(1)} s` : `${rounded(value)} ms`);

function bytesPerSecond(value) {
  const units = ["B/s", "KiB/s", "MiB/s", "GiB/s"];
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit ? rounded(value) : value.toFixed(0)} ${units[unit]}`;
}

function duration(seconds) {
  const parts = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60, Math.floor(seconds) % 60];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

// --- parts of the page -----------------------------------------------------------------------------------------------

function showState(state) {
  byId("state").dataset.state = state;
  setText("state", state);
}

function drawTiles(view) {
  setText("model", view.model);
  setText("uptime", `up ${duration(view.uptime_s)}`);
  setText("running", String(view.requests.running));
  setText("waiting", String(view.requests.waiting));
  setText("finished", String(view.requests.finished));
  setText("failed", view.requests.failed ? `${view.requests.failed} failed` : "");
  setText("output-rate", rounded(view.throughput.output_tokens_per_s));
  setText("prompt-rate", rounded(view.throughput.prompt_tokens_per_s));
  setText("ttft", milliseconds(view.latency.ttft_p50_ms));
  setText("ttft-p95", view.latency.ttft_p95_ms === null ? "" : `95 %: ${milliseconds(view.latency.ttft_p95_ms)}`);
  setText("tpot", milliseconds(view.latency.tpot_p50_ms));
  setText("tpot-p95", view.latency.tpot_p95_ms === null ? "" : `95 %: ${milliseconds(view.latency.tpot_p95_ms)}`);
  setText("step", String(view.step));
  setText("preemptions", view.requests.preemptions ? `${view.requests.preemptions} preemptions` : "");
}

function bar(name) {
  const line = element("div", { class: "bar" });
  const track = element("i");
  track.append(element("b"));
  line.append(element("span", {}, name), track, element("span"));
  return line;
}

function setBar(line, share, text) {
  line.querySelector("b").style.width = `${(100 * Math.min(1, Math.max(0, share))).toFixed(1)}%`;
  line.lastChild.textContent = text;
}

function newCard(device) {
  const card = element("article", { class: "card", "data-rank": device.rank });
  card.style.setProperty("--device", deviceColour(device.rank));
  card.append(element("strong"), element("span", { class: "faint" }), bar("KV pages"), bar("busy"), element("p", { class: "faint" }));
  return card;
}

function drawDevices(devices) {
  const box = byId("devices");
  while (box.children.length > devices.length) box.lastChild.remove();
  devices.forEach((device, index) => {
    if (!box.children[index]) box.append(newCard(device));
    const [title, name, pages, busy, more] = box.children[index].children;
    const isSilent = device.silent_s > 2;
    box.children[index].classList.toggle("silent", isSilent);
    title.textContent = `rank ${device.rank}: ${device.role}`;
    name.textContent = `${device.device}, ${device.name}`;
    setBar(pages, device.pages_total ? device.pages_used / device.pages_total : 0, `${device.pages_used} / ${device.pages_total}`);
    setBar(busy, device.busy, `${(100 * device.busy).toFixed(0)} %`);
    const times = device.measured_us
      ? `; attention of a layer ${rounded(device.measured_us)} µs, predicted ${rounded(device.predicted_us)}`
      : "";
    more.textContent = isSilent ? `no heartbeat for ${device.silent_s.toFixed(1)} s` : `${device.heads} query heads${times}`;
  });
}

function drawLegend(box, entries) {
  if (box.children.length === entries.length) return;
  box.replaceChildren(
    ...entries.map(([name, colour]) => {
      const entry = element("span", {}, name);
      const mark = element("i");
      mark.style.background = colour;
      entry.prepend(mark);
      return entry;
    }),
  );
}

function drawMap(view) {
  drawLegend(byId("legend"), view.devices.map((device) => [`rank ${device.rank}`, deviceColour(device.rank)]));
  byId("no-sequences").hidden = view.sequences.length > 0;
  const box = byId("map");
  while (box.children.length > view.sequences.length) box.lastChild.remove();
  view.sequences.forEach((sequence, index) => {
    if (!box.children[index]) {
      const line = element("div", { class: "sequence" });
      line.append(element("span"), element("div", { class: "cells" }));
      box.append(line);
    }
    const [label, cells] = box.children[index].children;
    label.textContent = `${sequence.tokens} tokens, ${sequence.state}`;
    label.title = sequence.id;
    const key = JSON.stringify(sequence.owners);
    if (cells.dataset.owners === key) return;
    cells.dataset.owners = key;
    cells.replaceChildren(...sequence.owners.flatMap((owners, stage) => cellsOf(owners, stage)));
  });
}

function cellsOf(owners, stage) {
  const cells = owners.map((rank, group) => {
    const title = `stage ${stage}, KV head ${group}: rank ${rank}`;
    const cell = element("i", { title, "data-rank": rank }, String(rank));
    cell.style.background = deviceColour(rank);
    return cell;
  });
  return stage ? [element("i", { class: "gap" }), ...cells] : cells;
}

function drawLinks(links) {
  byId("no-links").hidden = links.length > 0;
  byId("links").replaceChildren(
    ...links.map((link) => {
      const row = element("tr");
      row.append(
        element("td", {}, `rank ${link.source}`),
        element("td", {}, `rank ${link.target}`),
        element("td", { class: "number" }, bytesPerSecond(link.bytes_per_s)),
      );
      return row;
    }),
  );
}

// --- curves ----------------------------------------------------------------------------------------------------------

/** Gives the drawing one unit per pixel, so that text and lines keep their shape; returns [width, height]. */
function sizeOf(svg) {
  const { clientWidth: width, clientHeight: height } = svg;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  return [width, height];
}

function drawCurves(id, now, curves) {
  drawLegend(byId(`${id}-legend`), curves.map(({ name, colour }) => [name, colour]));
  const svg = byId(id);
  const [width, height] = sizeOf(svg);
  const values = curves.flatMap(({ of }) => history.map(of)).filter((value) => value !== null);
  const top = Math.max(1, ...values) * 1.1;
  const x = (time) => width * (1 - (now - time) / WINDOW_SECONDS);
  const y = (value) => height - 1 - (height - 16) * (value / top);
  const parts = [
    element("line", { class: "axis", x1: 0, x2: width, y1: height - 1, y2: height - 1 }, null, SVG),
    element("line", { class: "axis", x1: 0, x2: width, y1: y(top / 1.1), y2: y(top / 1.1) }, null, SVG),
    element("text", { x: 2, y: 11 }, rounded(top / 1.1), SVG),
  ];
  for (const { colour, of } of curves) {
    const points = history.filter((view) => of(view) !== null).map((view) => `${x(view.time).toFixed(1)},${y(of(view)).toFixed(1)}`);
    const curve = element("polyline", { class: "curve", points: points.join(" ") }, null, SVG);
    curve.style.stroke = colour;
    parts.push(curve);
  }
  svg.replaceChildren(...parts);
}

function drawTimeline(now) {
  drawLegend(byId("events-legend"), Object.entries(KINDS));
  const svg = byId("timeline");
  const [width, height] = sizeOf(svg);
  svg.replaceChildren(
    element("line", { class: "axis", x1: 0, x2: width, y1: height - 1, y2: height - 1 }, null, SVG),
    ...happened.map((event) => {
      const at = width * (1 - (now - event.time) / WINDOW_SECONDS);
      const lane = Math.max(0, Object.keys(KINDS).indexOf(event.kind));
      const mark = element("rect", { x: at - 1, y: 2 + 9 * lane, width: 2, height: 8 }, null, SVG);
      mark.style.fill = KINDS[event.kind] || "#7f7f7f";
      return mark;
    }),
  );
}

function logEvents(events) {
  const list = byId("events");
  for (const event of events) {
    const line = element("li");
    line.append(element("time", {}, new Date(1000 * event.time).toLocaleTimeString()), `${event.kind}: ${event.text}`);
    list.prepend(line);
  }
  while (list.children.length > MAX_LOG_LINES) list.lastChild.remove();
}

function forgetOld(list, now) {
  while (list.length && now - list[0].time > WINDOW_SECONDS) list.shift();
}

// --- the feed --------------------------------------------------------------------------------------------------------

function draw(view) {
  history.push({ time: view.time, throughput: view.throughput, latency: view.latency });
  happened.push(...view.events);
  forgetOld(history, view.time);
  forgetOld(happened, view.time);
  showState(view.state);
  drawTiles(view);
  drawDevices(view.devices);
  drawMap(view);
  drawLinks(view.links);
  drawCurves("throughput", view.time, [
    { name: "output", colour: PALETTE[0], of: (one) => one.throughput.output_tokens_per_s },
    { name: "prompts", colour: PALETTE[1], of: (one) => one.throughput.prompt_tokens_per_s },
  ]);
  drawCurves("latency", view.time, [
    { name: "first token, median", colour: PALETTE[2], of: (one) => one.latency.ttft_p50_ms },
    { name: "per output token, median", colour: PALETTE[3], of: (one) => one.latency.tpot_p50_ms },
  ]);
  drawTimeline(view.time);
  logEvents(view.events);
}

const feed = new EventSource("fleet/events");
feed.onmessage = (message) => draw(JSON.parse(message.data));
feed.onerror = () => showState("reconnecting");
