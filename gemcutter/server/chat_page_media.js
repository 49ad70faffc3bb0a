"use strict";
// Images and sounds that go with the next message: taken from files, drops and pastes, made no larger than a model sees, and shown.
// What is kept and sent of them is in chat_page_data.js; chat_page.js takes them when a message is sent.

const MOST_PIXELS = 2_700_000; // what the largest budget shows: 1120 tokens of 48 x 48 pixels, and a little more
const MOST_BYTES = 1 << 20; // of an image that is sent as it is
const MOST_SOUND_BYTES = 12 << 20;
const CALLED = { image: "images", audio: "sounds" };

const attached = []; // of the message that is being written

/** Return the kinds of media that the chosen model reads, as far as the server says; images where it does not. */
function readableKinds() {
  const told = state.models.find((model) => model.id === modelOf(state.chat))?.input_modalities;
  return Array.isArray(told) ? told.filter((kind) => kind in CALLED) : ["image"];
}

function dataUrl(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(blob);
  });
}

/** Return an image as it is, or with fewer pixels where a model would not see them all. */
async function shrunk(file) {
  let picture;
  try {
    picture = await createImageBitmap(file);
  } catch {
    return file; // a format that the browser does not know; the server may
  }
  const scale = Math.min(1, Math.sqrt(MOST_PIXELS / (picture.width * picture.height)));
  if (scale === 1 && file.size <= MOST_BYTES) return file;
  const canvas = new OffscreenCanvas(Math.max(1, Math.round(picture.width * scale)), Math.max(1, Math.round(picture.height * scale)));
  const pen = canvas.getContext("2d");
  pen.imageSmoothingQuality = "high";
  pen.fillStyle = "white"; // what the server lays transparent pixels on
  pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
  picture.close();
  const smaller = await canvas.convertToBlob({ type: "image/webp", quality: 0.95 });
  return smaller.size < file.size ? smaller : file;
}

/** Add files to the message that is being written, and say of those that can't go with it. */
async function attach(files) {
  const faults = [];
  for (const file of files) {
    const kind = file.type.split("/")[0], name = file.name || "file", kinds = readableKinds();
    if (!kinds.includes(kind)) {
      faults.push(`${name}: this model reads ${kinds.length ? kinds.map((each) => CALLED[each]).join(" and ") : "text alone"}.`);
    } else if (kind === "audio" && file.size > MOST_SOUND_BYTES) {
      faults.push(`${name}: more than ${MOST_SOUND_BYTES >> 20} MB.`);
    } else {
      attached.push({ kind, name, url: await dataUrl(kind === "image" ? await shrunk(file) : file) });
      say(`${name} attached.`);
    }
  }
  banner("attach", faults.join(" "));
  drawAttached();
}

/** Return what was attached, and begin anew. */
function takeAttached() {
  const taken = attached.splice(0);
  banner("attach", "");
  drawAttached();
  return taken;
}

function drawAttached() {
  const kinds = readableKinds();
  $("attach").hidden = !kinds.length;
  $("attach-file").accept = kinds.map((kind) => `${kind}/*`).join(",");
  $("attach").setAttribute("aria-label", `Attach ${kinds.map((kind) => CALLED[kind]).join(" or ")}`);
  $("attach").title = $("attach").getAttribute("aria-label");
  $("attached").hidden = !attached.length;
  $("attached").replaceChildren(...attached.map((item) => h("li", {}, mediaView(item),
    iconButton("close", `Remove ${item.name}`, () => { attached.splice(attached.indexOf(item), 1); drawAttached(); drawControls(); $("input").focus(); }))));
}

function mediaView(item) {
  if (item.kind === "audio") return h("audio", { src: item.url, controls: true, title: item.name, "aria-label": item.name });
  return h("img", { src: item.url, alt: item.name, title: item.name });
}

function listenForMedia() {
  const drop = (event) => {
    if (!event.dataTransfer?.types.includes("Files")) return; // text is dropped into fields as ever
    event.preventDefault();
    document.body.classList.toggle("dropping", event.type === "dragover");
    if (event.type === "drop") attach([...event.dataTransfer.files]).then(drawControls);
  };
  for (const name of ["dragover", "dragleave", "drop"]) document.addEventListener(name, drop);
  $("input").addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length || event.clipboardData.getData("text/plain")) return; // text of an office program comes with its picture
    event.preventDefault();
    attach(files).then(drawControls);
  });
  $("attach").addEventListener("click", () => $("attach-file").click());
  $("attach-file").addEventListener("change", async (event) => {
    await attach([...event.target.files]);
    event.target.value = "";
    drawControls();
    focusInput();
  });
}
