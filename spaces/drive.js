// The Drive page. Keys, buttons, a gamepad or the pointer give a command; one request at a time predicts its frames, which are
// shown at the robot's frame rate. A request asks for as many frames as are shown while it is in progress.
const models = JSON.parse(props.value);
const root = element.querySelector(".drive");
const find = (selector) => root.querySelector(selector);
const stage = find(".stage"), canvas = find("canvas"), file = find("input[type=file]"), slider = find(".speed input");
const MOST_FRAMES = 4; // per request: more would delay the response to a key
const SETTLE_MS = 800; // prediction continues this long after the last command
const RESTORED_FRAMES = 64, RESTORED_BYTES = 7e5; // per request, see endpoints.py and body_limit.py
const ARROWS = { ArrowUp: "\u2191", ArrowLeft: "\u2190", ArrowDown: "\u2193", ArrowRight: "\u2192" };
const TITLE = document.title;

let model = Object.keys(models)[0];
let start = Object.keys(models[model]?.starts ?? {})[0]; // name of an example, or an upload
let origin = null; // action at the robot's position in an uploaded image
let session = null; // name of the session; if it is null and there are frames, the session ended and can be restored
let space = models[model]?.space; // the action space
let frames = []; // data URLs: the frame before the recording, and the recorded frames
let actions = []; // the action that led to each of the frames; the hold action for the first
let demo = []; // actions of the example clip, until the visitor takes over
let goal = null; // point on the image that the robot moves to, raw units
let dragging = false; // whether the pointer moves the goal
let locating = false; // whether the next click on the image selects the robot's position
let running = null; // promise of the loop
let starting = null; // promise of the last start; a later one waits for it
let replaying = false;
let epoch = 0; // frames of an earlier epoch are not shown
let trip = 60; // milliseconds per request, smoothed
let pressed_at = null;
let answered_at = 0; // time of the last answer of the session
let last_answer = Promise.resolve();
const held = new Set();
const figures = (root.figures = { latencies: [], shown: [] });

async function call(name, data) {
  const answer = await fetch(`${window.gradio_config?.root ?? ""}/gradio_api/run/${name}`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ data }),
  });
  const body = await answer.json().catch(() => ({}));
  if (!answer.ok || body.error) throw new Error(body.error ?? body.detail ?? `The server answered with status ${answer.status}.`);
  return body.data;
}

// send a request of the session after the previous answer, because the server accepts one at a time
function ask(name, data) {
  last_answer = last_answer.catch(() => {}).then(() => call(name, [session, ...data]));
  return last_answer.finally(() => (answered_at = performance.now()));
}

const sleep = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

function say(text, bad = false) {
  const message = find(".message");
  message.hidden = !text;
  message.textContent = text ?? "";
  message.classList.toggle("bad", bad);
}

// show progress if the work takes long; show its errors
async function during(text, work) {
  const busy = find(".busy");
  busy.querySelector("span").textContent = busy.ariaLabel = text;
  const timer = setTimeout(() => (busy.hidden = false), 250);
  say();
  try {
    return await work();
  } catch (error) {
    fail(error);
  } finally {
    clearTimeout(timer);
    busy.hidden = true;
  }
}

function fail(error) {
  const ended = session && /^`session` must/.test(error.message);
  if (ended) session = null;
  if (ended && frames.length > 1) restore();
  else say(error.message === "Failed to fetch" ? "The server cannot be reached." : error.message, true);
  update();
}

function end() {
  if (session) call("stop", [session]).catch(() => {});
  [session, frames, actions] = [null, [], []];
}

function update() {
  find(".begin").hidden = Boolean(session) || !start;
  const [low, high] = [space?.low, space?.high];
  find(".goal").hidden = !goal;
  if (goal) ["left", "top"].forEach((side, index) => (find(".goal").style[side] = `${(100 * (goal[index] - low[index])) / (high[index] - low[index])}%`));
  root.classList.toggle("running", Boolean(running));
  stage.classList.toggle("planar", planar());
  find(".hint.drag").hidden = !planar();
  find(".state").textContent = replaying ? "Replay" : running ? (demo.length ? "Example actions: press a key to take over" : "Driving") : session ? "Ready to drive" : "Ready";
  find(".count").textContent = frames.length > 1 ? `${frames.length - 1} predicted` : "";
  const some = session && frames.length > 1;
  for (const button of root.querySelectorAll(".tools button")) button.disabled = !some;
  find("[data-do=replay]").textContent = replaying ? "Stop" : "Replay";
  for (const button of root.querySelectorAll(".pictures button[data-start]")) button.ariaPressed = button.dataset.start === start;
}

async function draw(url, of = epoch) {
  const image = new Image();
  image.src = url;
  await image.decode();
  if (of !== epoch) return false;
  if (canvas.width !== image.width || canvas.height !== image.height) {
    [canvas.width, canvas.height] = [image.width, image.height];
    stage.style.aspectRatio = `${image.width} / ${image.height}`;
  }
  canvas.getContext("2d").drawImage(image, 0, 0);
  return true;
}

// ---- driving

const planar = () => space?.space === "absolute" && space.names.length === 2 && [...space.low, ...space.high].every(Number.isFinite);
const clamp = (value) => Math.max(-1, Math.min(1, value));

function command(number) {
  const values = space.names.map(() => 0);
  const stick = gamepad();
  for (const { key, component, sign } of space.controls) values[component] += sign * (held.has(key) ? 1 : (stick[key] ?? 0));
  if (values.some((value) => value !== 0)) goal = null; // the visitor takes over
  if (goal) goal.forEach((value, index) => (values[index] += (value - actions[actions.length - 1][index]) / (space.step[index] * slider.value * number)));
  const wanted = values.map((value) => (Math.abs(value) < 0.02 ? 0 : clamp(value))); // close enough
  if (!dragging && wanted.every((value) => value === 0)) goal = null; // reached
  return wanted;
}

function gamepad() {
  const keys = {};
  for (const pad of navigator.getGamepads?.() ?? []) {
    if (!pad) continue;
    const axes = [["ArrowLeft", "ArrowRight"], ["ArrowUp", "ArrowDown"], ["o", "u"], ["r", "f"]];
    axes.forEach(([negative, positive], index) => {
      const value = pad.axes[index] ?? 0;
      if (Math.abs(value) > 0.15) keys[value < 0 ? negative : positive] = Math.abs(value);
    });
    const buttons = { 6: "h", 7: "g", 12: "ArrowUp", 13: "ArrowDown", 14: "ArrowLeft", 15: "ArrowRight" };
    for (const [index, key] of Object.entries(buttons)) if (pad.buttons[index]?.pressed) keys[key] = 1;
  }
  return keys;
}

function in_turn(work) {
  const mine = Promise.resolve(starting).then(work).finally(() => starting === mine && (starting = null));
  return (starting = mine);
}

const begin = (action = null) => in_turn(() => start_session(action));

function start_session(action) {
  locating = false;
  return during("Starting\u2026", async () => {
    await halt();
    end();
    const [name, first, found] = await call("start", [model, start, action, 0]);
    [session, space, frames, actions, demo, origin] = [name, found, [first], [found.hold], [], action];
    answered_at = performance.now();
    find(".saved").hidden = true;
    await draw(first);
    build_pad();
    return session;
  }).finally(update);
}

// continue an ended session from the frames in this page
function restore() {
  return in_turn(async () => {
    if (session) return session;
    const restored = await during("Restoring your recording\u2026", async () => {
      const [left, taken] = [frames.slice(1), actions.slice(1)];
      [session] = await call("start", [model, start, origin, 0]);
      while (left.length) {
        let [count, size] = [0, 0];
        while (count < Math.min(RESTORED_FRAMES, left.length) && (!count || size + left[count].length < RESTORED_BYTES)) size += left[count++].length;
        await ask("restore", [left.splice(0, count), taken.splice(0, count)]);
      }
      say("Your session had ended. The recording was restored.");
      return session;
    });
    if (!restored) session = null; // the frames stay in the page, for another attempt
    return restored;
  }).finally(() => {
    update();
    if (session && (held.size || goal)) drive();
  });
}

// keep the session while the browser tab is visible; announce its end in the title of a hidden tab
function keep() {
  if (!session) return (document.title = TITLE);
  const idle = 1000 * space.idle_seconds, passed = performance.now() - answered_at;
  const left = Math.ceil((idle - passed) / 1000);
  const warning = left > 0 ? `Session ends in ${left} s` : "Session ended";
  document.title = document.hidden && passed > 0.6 * idle ? `${warning} \u00b7 ${TITLE}` : TITLE;
  if (!document.hidden && !running && !starting && passed > 0.3 * idle) {
    answered_at = performance.now();
    ask("undo", [0]).catch(fail);
  }
}
setInterval(keep, 500);

// wait for the loop to end, and drop frames that have not been shown
async function halt() {
  epoch += 1;
  [replaying, goal, dragging] = [false, null, false];
  demo = [];
  await running;
  if (session) await draw(frames[frames.length - 1]);
}

async function drive() {
  if (running || (!session && !start)) return;
  if (replaying) await halt();
  if (!(await (starting ?? session ?? (frames.length > 1 ? restore() : begin())))) return;
  if (running) return;
  running = loop(epoch).catch(fail).finally(() => ((running = null), update()));
  update();
}

async function loop(mine) {
  const interval = 1000 / space.fps;
  let due = performance.now(); // when to show the next frame
  let quiet_since = null;
  while (session && mine === epoch && visible()) {
    const number = Math.min(Math.max(1, Math.ceil((trip - 5) / interval)), MOST_FRAMES, space.max_chunk);
    const wanted = command(number);
    if (wanted.some((value) => value !== 0)) {
      if (locating) say(); // the visitor drives without selecting the robot's position
      [demo, quiet_since, locating] = [[], null, false];
    } else quiet_since ??= performance.now();
    if (!demo.length && quiet_since && performance.now() - quiet_since > SETTLE_MS) break;
    const [asked, press] = [performance.now(), pressed_at];
    pressed_at = null;
    const waiting = setTimeout(() => (find(".state").textContent = "Waiting in the queue\u2026"), 1000);
    try {
      const rows = demo.splice(0, number);
      const [pictures, taken] = rows.length ? [(await ask("step", [rows]))[0], rows] : await ask("drive", [wanted, number, Number(slider.value)]);
      frames.push(...pictures);
      actions.push(...taken);
      for (const list of [frames, actions]) list.splice(0, Math.max(0, list.length - 1 - space.max_frames));
      if (mine !== epoch) return;
      trip += 0.3 * (performance.now() - asked - trip);
      due = Math.max(due, performance.now() - interval);
      pictures.forEach((picture, index) => show(picture, due + index * interval, mine, index === 0 ? press : null));
      due += pictures.length * interval;
    } finally {
      clearTimeout(waiting);
    }
    update();
    await sleep(Math.max(0, due - performance.now() - trip));
  }
  await sleep(Math.max(0, due - interval - performance.now()));
}

async function show(picture, at, mine, press) {
  await sleep(Math.max(0, at - performance.now()));
  if (!(await draw(picture, mine))) return;
  const now = performance.now();
  figures.shown.push(now);
  if (press !== null) figures.latencies.push(now - press);
  for (const list of Object.values(figures)) if (list.length > 500) list.shift();
  const recent = figures.shown.slice(-15);
  const rate = (1000 * (recent.length - 1)) / (recent[recent.length - 1] - recent[0]);
  const latency = [...figures.latencies.slice(-9)].sort((a, b) => a - b)[Math.floor(Math.min(figures.latencies.length, 9) / 2)];
  find(".figures").textContent = [rate > 1 && `${rate.toFixed(1)} frames/s`, latency && `key to frame ${latency.toFixed(0)} ms`].filter(Boolean).join(" \u00b7 ");
}

// ---- keys, buttons, picture

const visible = () => !document.hidden && root.checkVisibility();

function press(key) {
  if (!held.has(key)) pressed_at ??= performance.now();
  held.add(key);
  root.querySelector(`[data-key="${key}"]`)?.classList.add("down");
  drive();
}

function release(key) {
  held.delete(key);
  root.querySelector(`[data-key="${key}"]`)?.classList.remove("down");
}

const release_all = () => [...held].forEach(release);

function key_of(event) {
  const key = event.key.length > 1 ? event.key : event.key.toLowerCase();
  const known = space?.same_keys[key] ?? key;
  return space?.controls.some((control) => control.key === known) ? known : null;
}

const editable = (target) => target.matches?.("input, textarea, select, video, [contenteditable]");

document.addEventListener("keydown", (event) => {
  const key = key_of(event);
  if (!key || !visible() || editable(event.target) || event.ctrlKey || event.altKey || event.metaKey) return;
  event.preventDefault();
  press(key);
});
window.addEventListener("keyup", (event) => key_of(event) && release(key_of(event)));
window.addEventListener("blur", release_all);
document.addEventListener("visibilitychange", () => {
  release_all();
  keep();
});
window.addEventListener("pagehide", () => {
  const body = new Blob([JSON.stringify({ data: [session] })], { type: "application/json" });
  if (session) navigator.sendBeacon(`${window.gradio_config?.root ?? ""}/gradio_api/run/stop`, body);
});
window.addEventListener("gamepadconnected", () => say("Gamepad connected: drive with its stick."));
setInterval(() => !running && visible() && steered() && drive(), 50);

function steered() {
  const stick = gamepad();
  return space?.controls.some(({ key }) => stick[key]);
}

function build_pad() {
  const button = ({ key, label }) => {
    const made = document.createElement("button");
    made.type = "button";
    made.dataset.key = key;
    made.textContent = ARROWS[key] ?? label;
    made.ariaLabel = label;
    made.addEventListener("pointerdown", (event) => {
      event.preventDefault();
      made.setPointerCapture(event.pointerId);
      stage.focus({ preventScroll: true });
      press(key);
    });
    for (const name of ["pointerup", "pointercancel", "lostpointercapture"]) made.addEventListener(name, () => release(key));
    made.addEventListener("keydown", (event) => [" ", "Enter"].includes(event.key) && (event.preventDefault(), press(key)));
    made.addEventListener("keyup", () => release(key));
    made.addEventListener("contextmenu", (event) => event.preventDefault());
    return made;
  };
  const controls = space?.controls ?? [];
  find(".pad").replaceChildren(...controls.filter(({ key }) => key in ARROWS).map(button));
  find(".more").replaceChildren(...controls.filter(({ key }) => !(key in ARROWS)).map(button));
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  const share = [(event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height];
  return share.map((value, index) => space.low[index] + Math.max(0, Math.min(1, value)) * (space.high[index] - space.low[index]));
}

canvas.addEventListener("pointerdown", async (event) => {
  if (!planar() || !session || replaying) return;
  canvas.setPointerCapture(event.pointerId);
  if (locating) {
    locating = false;
    await begin(place(event));
    return;
  }
  pressed_at ??= performance.now();
  [goal, dragging] = [place(event), true];
  update();
  drive();
});
canvas.addEventListener("pointermove", (event) => {
  if (!dragging) return;
  goal = place(event);
  drive(); // prediction pauses when the goal is reached
});
for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, () => (dragging = false));

// ---- start pictures and tools

function build_pictures() {
  const known = Object.entries(models[model]?.starts ?? {}).map(([name, { picture }]) => {
    const made = document.createElement("button");
    made.type = "button";
    made.dataset.start = name;
    made.ariaLabel = `Start from ${name}`;
    made.title = name;
    made.append(Object.assign(new Image(), { src: picture, alt: "" }));
    made.addEventListener("click", () => choose(name));
    return made;
  });
  const more = document.createElement("button");
  more.type = "button";
  more.className = "upload";
  more.textContent = "+ Upload";
  more.addEventListener("click", () => file.click());
  find(".pictures").replaceChildren(...known, more);
}

async function choose(name) {
  start = name;
  locating = false;
  stage.focus({ preventScroll: true });
  await begin();
}

file.addEventListener("change", async () => {
  const [picture] = file.files;
  file.value = "";
  if (!picture) return;
  await halt();
  const sent = await during("Uploading\u2026", async () => {
    if (picture.size > 1e7) throw new Error(`The image must have at most 10 MB, got ${Math.ceil(picture.size / 1e4) / 100} MB.`);
    return upload(picture);
  });
  if (!sent) return;
  const before = start;
  start = { path: sent.path, meta: { _type: "gradio.FileData" } };
  if (!(await begin())) {
    start = before;
    return update();
  }
  if (planar()) {
    locating = true;
    say("Click on the robot in the image, then drive.");
  }
});

const tools = {
  async reset() {
    const [first] = await ask("reset", []);
    [frames, actions] = [[first], [space.hold]];
    await draw(first);
  },
  async undo() {
    const [picture, left] = await ask("undo", [Math.round(space.fps)]);
    frames.length = actions.length = left + 1;
    await draw(picture);
  },
  async replay() {
    replaying = true;
    const mine = epoch;
    update();
    for (const picture of frames) {
      if (!(await draw(picture, mine))) return;
      await sleep(1000 / space.fps);
    }
    replaying = false;
  },
  async save() {
    const [video, actions] = await ask("record", []);
    find(".saved video").src = find(".saved a.video").href = video.url;
    find(".saved a.actions").href = actions.url;
    find(".saved").hidden = false;
    find(".saved").scrollIntoView({ block: "nearest" });
  },
};
const DOING = { reset: "Resetting\u2026", undo: "Undoing\u2026", replay: "", save: "Writing the video\u2026" };

find(".tools").addEventListener("click", async (event) => {
  const what = event.target.dataset.do;
  if (!what || event.target.disabled || starting) return;
  stage.focus({ preventScroll: true });
  const stop = what === "replay" && replaying;
  await halt();
  if (what === "replay" && !stop) await tools.replay();
  else if (!stop) await during(DOING[what], tools[what]);
  update();
});

find(".begin").addEventListener("click", async () => {
  stage.focus({ preventScroll: true });
  if (!(await begin())) return;
  demo = [...(models[model].starts[start]?.demo ?? [])];
  drive();
});
stage.addEventListener("pointerdown", () => stage.focus({ preventScroll: true }));
slider.addEventListener("input", () => (find(".speed output").textContent = `${Number(slider.value).toFixed(1)}\u00d7`));
slider.addEventListener("change", () => stage.focus({ preventScroll: true }));

function open(name) {
  [model, start, session, frames, actions, origin] = [name, Object.keys(models[name].starts)[0], null, [], [], null];
  space = models[name].space;
  build_pad();
  build_pictures();
  update();
  if (start) draw(models[name].starts[start].picture);
  else say("This model has no start images. Upload one.");
}

const select = find(".model");
select.hidden = Object.keys(models).length < 2;
select.replaceChildren(...Object.keys(models).map((name) => new Option(name, name)));
select.addEventListener("change", () =>
  in_turn(async () => {
    await halt();
    end();
    open(select.value);
  }),
);
if (model) {
  open(model);
  stage.focus({ preventScroll: true });
}
