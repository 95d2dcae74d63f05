const panels = element.querySelector(".panels");
const controls = element.querySelector(".controls");
const slider = element.querySelector(".frame");
const clock = element.querySelector(".time");
const button = element.querySelector(".play");
const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
const pause = 0.8; // seconds on the last frame

let shown = { panels: [], fps: 10, seen: 0 };
let sheets = [];
let length = 0;
let playing = !calm;
let frame = 0;
let due = 0;
let version = 0;

function build(value) {
  panels.replaceChildren(
    ...value.panels.map((panel) => {
      const figure = document.createElement("figure");
      const canvas = document.createElement("canvas");
      const caption = document.createElement("figcaption");
      canvas.width = panel.width;
      canvas.height = panel.height;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", panel.title);
      canvas.classList.toggle("small", panel.width < 256);
      caption.textContent = panel.title;
      figure.append(caption, canvas);
      return figure;
    }),
  );
}

async function load(url) {
  if (!url) return null;
  const image = new Image();
  image.src = url;
  await image.decode();
  return image;
}

async function show(value) {
  const own = ++version;
  const loaded = value ? await Promise.all(value.panels.map((panel) => load(panel.sheet))) : [];
  if (own !== version) return;
  const layout = (video) => JSON.stringify(video.panels.map((each) => [each.title, each.width, each.height]));
  const next = value || { panels: [], fps: 10, seen: 0 };
  const changed = layout(next) !== layout(shown);
  if (changed) {
    build(next);
    frame = 0;
  }
  shown = next;
  sheets = loaded;
  const before = length;
  length = Math.max(0, ...shown.panels.map((panel) => panel.count));
  slider.max = Math.max(0, length - 1);
  controls.hidden = length < 2;
  element.toggleAttribute("data-filled", shown.panels.length > 0);
  frame = Math.min(frame, Math.max(0, length - 1));
  draw();
  // on a phone, a new video is below the pressed button
  if (length && (changed || length < before)) element.scrollIntoView({ block: "nearest", behavior: calm ? "auto" : "smooth" });
}

function draw() {
  const canvases = panels.querySelectorAll("canvas");
  shown.panels.forEach((panel, index) => {
    if (!sheets[index] || !canvases[index]) return;
    const place = Math.min(frame, panel.count - 1); // a shorter video stays on its last frame
    const { width, height, columns } = panel;
    const [column, row] = [place % columns, Math.floor(place / columns)];
    const context = canvases[index].getContext("2d");
    context.drawImage(sheets[index], column * width, row * height, width, height, 0, 0, width, height);
  });
  const ahead = frame - shown.seen + 1;
  slider.value = frame;
  element.dataset.frame = frame;
  const name = !shown.seen ? `${frame + 1} / ${length}` : ahead > 0 ? `+${ahead}` : "seen";
  clock.textContent = `${name} · ${(frame / shown.fps).toFixed(1)} s`;
  button.textContent = playing ? "❚❚" : "▶";
}

function tick(now) {
  if (!element.isConnected) return;
  if (playing && length > 1 && now >= due) {
    const last = frame >= length - 1;
    frame = last ? 0 : frame + 1;
    due = now + 1000 * (1 / shown.fps + (frame === length - 1 ? pause : 0));
    draw();
  }
  requestAnimationFrame(tick);
}

button.addEventListener("click", () => {
  playing = !playing;
  draw();
});
slider.addEventListener("input", () => {
  playing = false;
  frame = Number(slider.value);
  draw();
});
watch("value", () => show(props.value));
show(props.value);
requestAnimationFrame(tick);
