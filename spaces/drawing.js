const stage = element.querySelector(".stage");
const picture = element.querySelector("img");
const paths = element.querySelectorAll("path");
const tip = element.querySelector(".tip");
const hint = element.querySelector(".hint");
const starts = element.querySelector(".starts");
const MAX_POINTS = 20000; // as in drawing.py

let points = []; // x, y in [0, 1], milliseconds
let pen = null;

function place(event) {
  const box = stage.getBoundingClientRect();
  const share = (value, start, size) => Math.min(1, Math.max(0, (value - start) / size));
  const rounded = (value, factor) => Math.round(value * factor) / factor; // keeps the request short
  const x = share(event.clientX, box.left, box.width), y = share(event.clientY, box.top, box.height);
  return [rounded(x, 1e4), rounded(y, 1e4), rounded(event.timeStamp, 10)];
}

function draw() {
  const steps = points.map(([x, y]) => `${x} ${y}`);
  paths.forEach((path) => path.setAttribute("d", steps.length ? `M ${steps.join(" L ")}` : ""));
  tip.hidden = points.length === 0;
  if (points.length) {
    const [x, y] = points[points.length - 1];
    tip.style.left = `${100 * x}%`;
    tip.style.top = `${100 * y}%`;
  }
  hint.hidden = points.length > 0 || !hint.textContent;
}

function show() {
  const value = props.value || {};
  if (value.image && picture.src !== value.image) picture.src = value.image;
  stage.classList.toggle("small", Boolean(value.small));
  stage.classList.toggle("enabled", Boolean(value.enabled));
  hint.textContent = value.hint || "";
  if (pen === null) points = value.path || [];
  draw();
  starts.replaceChildren(
    ...(value.starts || []).map((url, index) => {
      const button = document.createElement("button");
      const image = document.createElement("img");
      button.type = "button";
      button.setAttribute("aria-pressed", index === value.chosen);
      button.addEventListener("click", () => trigger("picked", { index }));
      image.src = url;
      image.alt = `Start frame ${index + 1}`;
      button.append(image);
      return button;
    }),
  );
}

stage.addEventListener("pointerdown", (event) => {
  if (!(props.value || {}).enabled || pen !== null || event.button !== 0) return;
  event.preventDefault();
  pen = event.pointerId;
  stage.setPointerCapture(pen);
  points = [place(event)];
  draw();
});
stage.addEventListener("pointermove", (event) => {
  if (event.pointerId !== pen || points.length >= MAX_POINTS - 100) return;
  const between = event.getCoalescedEvents ? event.getCoalescedEvents() : [];
  points.push(...(between.length ? between : [event]).map(place));
  draw();
});
function lift(event) {
  if (event.pointerId !== pen) return;
  points.push(place(event));
  pen = null;
  props.value = { ...props.value, path: points };
  trigger("drawn", { path: points }); // without the pictures of the value, which the server already has
}
stage.addEventListener("pointerup", lift);
stage.addEventListener("pointercancel", lift);

watch("value", show);
show();
