// Draws what demo_landscape.scene gives, and sends back where points are dragged to.
const NS = "http://www.w3.org/2000/svg";
const SIZE = 400;
const figures = [...element.querySelectorAll("figure")];
// `moves` counts places that points were moved to: a message and its answer carry the count. `asked` is that of the message without an answer.
let points = [], query = [0, 0], moves = 0, held = null, asked = null, overdue = null;

const reach = () => props.value.reach;
const onScreen = ([x, y]) => [(x / reach() + 1) * SIZE / 2, (1 - y / reach()) * SIZE / 2];
const limit = (v) => Math.max(-0.97 * reach(), Math.min(0.97 * reach(), v));

function inPlane(svg, event) {
  const box = svg.getBoundingClientRect();
  const x = ((event.clientX - box.left) / box.width * 2 - 1) * reach();
  const y = (1 - (event.clientY - box.top) / box.height * 2) * reach();
  return [limit(x), limit(y)];
}

function make(name, attributes, parent) {
  const node = document.createElementNS(NS, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  parent.appendChild(node);
  return node;
}

const line = (places) => places.map((place) => onScreen(place).map((v) => v.toFixed(1)).join(",")).join(" ");

function place(handle, where) {
  handle.setAttribute("transform", `translate(${onScreen(where).join(" ")})`);
}

// The patterns can be dragged; their features follow, as Phi takes them.
function placeAll() {
  figures.forEach((figure, side) => {
    const places = side === 0 ? [...points, query] : [...props.value.sides[1].points, props.value.sides[1].query[0]];
    figure.querySelectorAll(".handle").forEach((handle, index) => place(handle, places[index]));
  });
}

// One message at a time, so that the picture follows a point as fast as the server draws, and always to its last place.
function send() {
  if (asked !== null) return;
  asked = moves;
  overdue = setTimeout(() => answered(asked), 4000);
  trigger("input", { points: points, query: query, stamp: moves });
}

function answered(stamp) {
  if (asked === null || stamp < asked) return;
  clearTimeout(overdue);
  const behind = moves > asked;
  asked = null;
  if (behind) send();
}

function move(index, where) {
  if (index < 0) query = where; else points[index] = where;
  moves += 1;
  placeAll();
}

function addHandle(group, index, movable) {
  const isQuery = index < 0;
  const name = isQuery ? "query x" : `memory ${index + 1}`;
  const handle = make("g", { class: `handle${isQuery ? " query" : ""}${movable ? " movable" : ""}`, "data-index": index }, group);
  if (movable) make("circle", { r: 22, class: "reach" }, handle);
  if (isQuery) make("rect", { x: -8, y: -8, width: 16, height: 16, rx: 2, transform: "rotate(45)", class: "mark" }, handle);
  else make("circle", { r: 11, class: "mark", fill: props.value.colors[index] }, handle);
  make("text", { class: "name", y: 4.5 }, handle).textContent = isQuery ? "x" : index + 1;
  if (!movable) return;
  for (const [key, value] of Object.entries({ tabindex: 0, role: "button", "aria-label": `${name}: drag it, or use the arrow keys` })) {
    handle.setAttribute(key, value);
  }
  handle.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    handle.focus({ preventScroll: true });
    handle.setPointerCapture(event.pointerId);
    held = index;
  });
  // A finger on a point moves the point, not the page; touch-action alone is not heeded inside an SVG everywhere.
  handle.addEventListener("touchstart", (event) => event.preventDefault(), { passive: false });
  handle.addEventListener("pointermove", (event) => {
    if (held !== index) return;
    move(index, inPlane(handle.ownerSVGElement, event));
    send();
  });
  const letGo = () => {
    if (held !== index) return;
    held = null;
    send();
  };
  handle.addEventListener("pointerup", letGo);
  handle.addEventListener("pointercancel", letGo);
  handle.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
    if (!steps) return;
    event.preventDefault();
    const [x, y] = index < 0 ? query : points[index];
    move(index, [limit(x + 0.05 * steps[0]), limit(y + 0.05 * steps[1])]);
    send();
  });
}

function draw() {
  const value = props.value;
  if (!value || !value.sides) return;
  // An answer to an earlier place of a point must not pull it back from under the finger.
  if (held === null && value.stamp >= moves) {
    points = value.points.map((point) => [...point]);
    query = [...value.query];
    moves = value.stamp;
  }
  figures.forEach((figure, side) => {
    const { title, image, paths, query: way, ending } = value.sides[side];
    const svg = figure.querySelector("svg");
    figure.querySelector("figcaption").innerHTML = `<b>${title}</b><span>${ending}</span>`;
    if (!svg.querySelector("image")) {
      make("image", { x: 0, y: 0, width: SIZE, height: SIZE, preserveAspectRatio: "none" }, svg);
      make("g", { class: "paths" }, svg);
      make("polyline", { class: "way halo" }, svg);
      make("polyline", { class: "way" }, svg);
      make("g", { class: "stops" }, svg);
      make("g", { class: "handles" }, svg);
    }
    svg.querySelector("image").setAttribute("href", image);
    const group = svg.querySelector(".paths");
    group.replaceChildren();
    for (const one of paths) {
      make("polyline", { points: line(one) }, group);
      const [x, y] = onScreen(one[0]);
      make("circle", { cx: x, cy: y, r: 1.8 }, group);
    }
    svg.querySelectorAll(".way").forEach((node) => node.setAttribute("points", line(way)));
    const stops = svg.querySelector(".stops");
    stops.replaceChildren();
    for (const stop of way.slice(1)) {
      const [x, y] = onScreen(stop);
      make("circle", { cx: x, cy: y, r: 3.2 }, stops);
    }
    const handles = svg.querySelector(".handles");
    if (handles.childElementCount !== points.length + 1) {
      handles.replaceChildren();
      points.forEach((_, index) => addHandle(handles, index, side === 0));
      addHandle(handles, -1, side === 0);
    }
  });
  placeAll();
  answered(value.stamp);
}

watch("value", draw);
draw();
