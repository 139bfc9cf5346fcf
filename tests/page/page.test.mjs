// The page in Chromium: node --test page.test.mjs, with DENOISED_BINARY and CHROMIUM in the environment.
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import path from "node:path";
import { after, before, test } from "node:test";
import { chromium } from "playwright-core";

const { DENOISED_BINARY: binary, CHROMIUM: executablePath, SCREENSHOTS: screenshots } = process.env;
const axe = await readFile(path.join(import.meta.dirname, "node_modules/axe-core/axe.min.js"), "utf8");
/** Milliseconds that anything may take. */
const PATIENCE = 60_000;

let browser;
let server;

before(async () => {
  browser = await chromium.launch({
    executablePath,
    args: [
      "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
      "--disable-component-update", "--disable-sync",
    ],
  });
  server = await serve();
});

after(async () => {
  await server?.stop();
  await browser?.close();
});

async function freePort() {
  const socket = createServer().listen(0, "127.0.0.1");
  await new Promise((listening) => socket.once("listening", listening));
  const { port } = socket.address();
  await new Promise((closed) => socket.close(closed));
  return port;
}

/** Starts a server and waits until it listens. */
async function serve(settings = {}, port = undefined) {
  port ??= await freePort();
  const url = `${settings.DENOISED__SERVER__TLS_KEY ? "https" : "http"}://127.0.0.1:${port}`;
  const env = { ...process.env, ...settings };
  const child = spawn(binary, ["serve", "--listen", `127.0.0.1:${port}`], { env, stdio: ["ignore", "pipe", "pipe"] });
  let log = "";
  for (const stream of [child.stdout, child.stderr]) stream.on("data", (bytes) => (log += bytes));
  const gone = new Promise((exited) => child.once("exit", exited));
  const started = Date.now();
  for (;;) {
    if (log.includes("listening on")) break;
    assert.ok(child.exitCode === null && Date.now() - started < PATIENCE, log);
    await new Promise((later) => setTimeout(later, 50));
  }
  const stop = async (signal = "SIGTERM") => {
    child.kill(signal);
    await gone;
  };
  return { url, port, stop, log: () => log };
}

/** A page of its own, which may ask nobody but its server and has no errors. */
async function open(t, url, options = {}) {
  const context = await browser.newContext({ viewport: { width: 1280, height: 900 }, reducedMotion: "no-preference", ...options });
  t.after(() => context.close());
  const page = await context.newPage();
  page.setDefaultTimeout(PATIENCE);
  const strangers = [];
  page.on("request", (request) => {
    if (!request.url().startsWith(new URL(url).origin)) strangers.push(request.url());
  });
  const errors = [];
  page.on("pageerror", (error) => errors.push(String(error)));
  t.after(() => {
    assert.deepEqual(strangers, []);
    assert.deepEqual(errors, []);
  });
  await page.goto(url);
  return page;
}

const button = (page, name) => page.getByRole("button", { name, exact: true });
const cells = (page, sample = 0) => page.locator(".cells").nth(sample);
const heard = (page, sample = 0) => page.locator(".canvas .heard").nth(sample);
const settled = (page) => page.locator(".run strong", { hasText: /^(done|stopped|failed)$/ }).waitFor();

/** Types the fields of the form. */
async function fill(page, template, fields = {}) {
  await page.getByLabel("Text and gaps").fill(template);
  await page.locator(".editor details").evaluate((details) => (details.open = true));
  for (const [name, value] of Object.entries(fields)) {
    if (name === "sampler") await page.getByLabel("Sampler").selectOption(value);
    else await page.locator(`input[name=${name}]`).fill(String(value));
  }
}

/** Denoises and shows the end. */
async function denoised(page) {
  await button(page, "Denoise").click();
  await page.getByLabel("Shown in").selectOption("0");
  await settled(page);
  assert.equal(await page.locator(".run strong").textContent(), "done", await page.locator(".run").innerText());
  await page.waitForFunction(() => !document.querySelector(".cells .masked") && document.querySelector(".cells .cell"));
}

/** Sets the scrubber as a person does, with the keyboard. */
async function scrubTo(page, key) {
  await page.getByRole("slider").focus();
  await page.keyboard.press(key);
}

/** Matches what has all the text of `state`, with something in place of its masks. */
function holding(state) {
  const escape = RegExp.escape ?? ((text) => text.replace(/[^\w\s]/g, "\\$&"));
  return new RegExp(`^${state.trim().split(/(?:░░)+/).map(escape).join(".*")}$`, "s");
}

test("text comes out of noise, is scrubbed back, and goes on from there to the same end", async (t) => {
  const page = await open(t, server.url);
  await fill(page, "In the beginning", { length: 64, steps: 64, seed: 3 });
  // What the cells show at each change, from the first on.
  await page.evaluate(() => {
    window.seen = new Set();
    const look = () => {
      const cells = document.querySelector(".cells");
      if (cells) window.seen.add(cells.textContent);
    };
    new MutationObserver(look).observe(document.body, { subtree: true, childList: true, characterData: true });
  });
  await page.keyboard.press("Tab");
  await page.getByLabel("Text and gaps").press("Control+Enter");
  await page.waitForFunction(() => document.querySelector(".cells") && !document.querySelector(".cells .masked"));
  const states = await page.evaluate(() => [...window.seen]);
  assert.ok(states.length >= 10, `${states.length} states`);
  assert.ok(states[0].includes("░") && !states.at(-1).includes("░"), states[0]);
  const masks = states.map((state) => state.split("░").length);
  assert.deepEqual(masks, masks.toSorted((a, b) => b - a), "masks only become fewer");

  const text = await heard(page).textContent();
  assert.ok(text.startsWith("In the beginning") && text.length > 60, text);
  // Certainty and the time of each token, in words and colours.
  assert.ok((await page.locator(".cell[class*=certainty-]").count()) > 20);
  assert.match(await page.locator(".cell[class*=certainty-]").first().getAttribute("title"), /^step \d+ of 65, probability [\d.]+ %$/);
  await page.getByLabel("Colours tell").selectOption("time");
  assert.ok((await page.locator(".cell[class*=time-]").count()) > 20);

  await scrubTo(page, "Home");
  assert.match(await page.locator(".canvas .facts").textContent(), /^61 of 64 masked/);
  for (let times = 0; times < 20; times += 1) await page.keyboard.press("ArrowRight");
  assert.equal(await page.locator(".scrubber span").textContent(), "Step 20 of 65");
  const early = await cells(page).textContent();
  assert.ok(early.includes("░"), early);
  await page.getByLabel("Shown in").selectOption("0");
  await button(page, "Go on from here").click();
  await settled(page);
  await page.waitForFunction(() => !document.querySelector(".cells .masked"));
  assert.equal(await heard(page).textContent(), text);

  // What stood there stays. A browser that was busy may not have been sent the state of every step before it: now more may
  // stand there at this one.
  await scrubTo(page, "Home");
  for (let times = 0; times < 20; times += 1) await page.keyboard.press("ArrowRight");
  const again = await cells(page).textContent();
  assert.ok(again.includes("░"), again);
  assert.match(again, holding(early));
  // Filled anew, the rest is another one.
  await page.locator("input[name=seed]").fill("4");
  await button(page, "Fill the rest anew").click();
  await page.locator(".run .facts", { hasText: "seed 4" }).waitFor();
  await settled(page);
  await page.waitForFunction(() => !document.querySelector(".cells .masked"));
  const other = await heard(page).textContent();
  assert.notEqual(other, text);
  assert.match(other, holding(again));
});

test("a link gives the same text again", async (t) => {
  const page = await open(t, server.url);
  await fill(page, "The son of[[6]] went to[[5]].", { temperature: 0.9 });
  await denoised(page);
  const text = await heard(page).textContent();
  assert.match(text, /^The son of.+ went to.+\.$/s);
  await page.context().grantPermissions(["clipboard-read", "clipboard-write"]);
  await button(page, "Copy link").click();
  const link = await page.evaluate(() => navigator.clipboard.readText());
  assert.equal(link, page.url());
  assert.match(link, /seed=\d+/);
  const other = await open(t, link);
  await other.getByLabel("Shown in").selectOption("0");
  await settled(other);
  await other.waitForFunction(() => document.querySelector(".cells") && !document.querySelector(".cells .masked"));
  assert.equal(await heard(other).textContent(), text);
});

test("a selection becomes a gap, and text is edited where it stands", async (t) => {
  const page = await open(t, server.url);
  const template = "And the man went up to the house of the king.";
  await fill(page, template, { seed: 5 });
  const field = page.getByLabel("Text and gaps");
  await field.evaluate((field, at) => field.setSelectionRange(at, at + " the house".length), template.indexOf(" the house"));
  await button(page, "Make selection a gap").click();
  await page.waitForFunction(() => document.querySelector("textarea").value.includes("[["));
  assert.equal(await field.inputValue(), "And the man went up to[[2]] of the king.");
  await denoised(page);
  const text = await heard(page).textContent();
  assert.ok(text.startsWith("And the man went up to") && text.endsWith(" of the king."), text);

  // With the mouse, over the cells from "man" to "up".
  const over = async (word) => page.locator(".cell", { hasText: new RegExp(`^ ?${word}$`) }).first().boundingBox();
  const [from, to] = [await over("man"), await over("up")];
  await page.mouse.move(from.x + 6, from.y + from.height / 2);
  await page.mouse.down();
  await page.mouse.move(to.x + to.width - 1, to.y + to.height / 2, { steps: 5 });
  await page.mouse.up();
  await button(page, "Noise selection again").last().click();
  assert.equal(await field.inputValue(), text.replace(" man went up", "[[~ man went up]]"));
  await page.locator(".run strong", { hasText: "done" }).waitFor();
  await page.getByLabel("Shown in").selectOption("0");
  await page.waitForFunction(() => !document.querySelector(".cells .masked"));
  const edited = await heard(page).textContent();
  assert.ok(edited.startsWith("And the") && edited.endsWith(text.slice(text.indexOf(" up") + 3)), edited);
});

test("tokens are selected with the keyboard alone", async (t) => {
  const page = await open(t, server.url);
  await fill(page, "And the man went up to the house of the king, and the king said to him[[8]].", { seed: 5 });
  await denoised(page);
  const text = await heard(page).textContent();
  const tokens = page.getByRole("listbox", { name: "Tokens of sample 1" });
  const active = () => tokens.evaluate((list) => document.getElementById(list.getAttribute("aria-activedescendant")).textContent);
  await page.getByRole("button", { name: "Copy link" }).focus();
  await page.keyboard.press("Tab");
  assert.equal(await tokens.evaluate((list) => list === document.activeElement), true);
  const press = async (...keys) => {
    for (const key of keys) await page.keyboard.press(key);
  };
  await press("ArrowRight", "ArrowRight");
  assert.equal(await active(), " man");
  await press("Shift+ArrowRight", "Shift+ArrowRight", "Shift+ArrowLeft");
  assert.deepEqual(await tokens.locator("[aria-selected=true]").allTextContents(), [" man", " went"]);
  await press("ArrowRight");
  assert.equal(await tokens.locator("[aria-selected=true]").count(), 0);
  await press("Shift+ArrowLeft", "Shift+ArrowLeft", "Shift+ArrowLeft");
  assert.deepEqual(await tokens.locator("[aria-selected=true]").allTextContents(), [" the", " man", " went", " up"]);
  await press("Escape", "End");
  assert.equal(await active(), ".");
  await press("Space", "Control+a");
  assert.equal(await tokens.locator("[aria-selected=false]").count(), 0);
  await press("Home", "ArrowUp");
  assert.equal(await active(), "And");

  // A line down and up again.
  await page.setViewportSize({ width: 360, height: 900 });
  const top = () =>
    tokens.evaluate((list) => {
      const cell = document.getElementById(list.getAttribute("aria-activedescendant"));
      return Math.round(cell.getClientRects()[0].top - list.getBoundingClientRect().top);
    });
  const line = await top();
  await press("ArrowRight", "ArrowRight", "ArrowDown");
  const below = await top();
  assert.ok(below > line, `${below} under ${line}`);
  await press("ArrowUp");
  assert.equal(await top(), line);
  assert.equal(await active(), " man");

  await press("Shift+ArrowRight", "Shift+ArrowRight");
  while (await button(page, "Make selection a gap").last().evaluate((button) => button !== document.activeElement)) await press("Tab");
  await press("Enter");
  assert.equal(await page.getByLabel("Text and gaps").inputValue(), text.replace(" man went up", "[[3]]"));
});

test("a run is stopped in its middle, and goes on from there", async (t) => {
  const page = await open(t, server.url);
  const fields = { length: 128, steps: 2000, sampler: "theta_trapezoidal", seed: 9 };
  await fill(page, "And it happened", fields);
  await button(page, "Denoise").click();
  await page.getByLabel("Shown in").selectOption("0");
  await page.waitForFunction(() => /Step [1-9]/.test(document.querySelector(".scrubber")?.textContent ?? ""));
  await button(page, "Stop").click();
  await settled(page);
  assert.equal(await page.locator(".run strong").textContent(), "stopped");
  await page.waitForFunction(() => document.querySelector(".cells .masked"));
  const step = Number(/Step (\d+)/.exec(await page.locator(".scrubber").innerText())[1]);
  const started = Date.now();
  while (!/Generate".*code="CANCELLED"/.test(server.log())) {
    assert.ok(Date.now() - started < PATIENCE, server.log());
    await new Promise((later) => setTimeout(later, 20));
  }
  await button(page, "Go on from here").click();
  await page.waitForFunction((step) => Number(/Step (\d+)/.exec(document.querySelector(".scrubber").textContent)[1]) > step, step);
  await button(page, "Stop").click();
  await settled(page);
});

test("a run goes on when its server was gone and is back", async (t) => {
  const first = await serve();
  const page = await open(t, first.url);
  const fields = { length: 96, steps: 150, sampler: "theta_trapezoidal", seed: 11 };
  await fill(page, "And it happened", fields);
  await denoised(page);
  const text = await heard(page).textContent();

  await button(page, "Denoise").click();
  await page.waitForFunction(() => /Step [1-9]/.test(document.querySelector(".scrubber")?.textContent ?? ""));
  await first.stop("SIGKILL");
  await page.locator(".run [role=status]", { hasText: "Trying again" }).waitFor();
  const second = await serve({}, first.port);
  t.after(() => second.stop());
  await settled(page);
  assert.equal(await page.locator(".run strong").textContent(), "done", await page.locator(".run").innerText());
  await page.waitForFunction(() => !document.querySelector(".cells .masked"));
  assert.equal(await heard(page).textContent(), text);
});

test("a token is asked for and kept in memory alone", async (t) => {
  const folder = await mkdtemp(path.join(tmpdir(), "denoised-page-"));
  t.after(() => rm(folder, { recursive: true }));
  const file = path.join(folder, "tokens.toml");
  const made = spawn(binary, ["token", "new", "alice", "--file", file], { stdio: ["ignore", "pipe", "inherit"] });
  let secret = "";
  made.stdout.on("data", (bytes) => (secret += bytes));
  assert.equal(await new Promise((exited) => made.once("exit", exited)), 0);
  const guarded = await serve({ DENOISED__SERVER__TOKENS: file });
  t.after(() => guarded.stop());
  const page = await open(t, guarded.url);
  const dialog = page.getByRole("dialog");
  await dialog.getByText("This server wants a token.").waitFor();
  await dialog.getByLabel("Token", { exact: true }).fill("wrong");
  await dialog.getByRole("button", { name: "Use it" }).click();
  await dialog.getByText("The server does not know this token.").waitFor();
  await dialog.getByLabel("Token", { exact: true }).fill(secret.trim());
  await dialog.getByRole("button", { name: "Use it" }).click();
  await dialog.waitFor({ state: "hidden" });
  await fill(page, "The[[4]].");
  await denoised(page);
  const kept = await page.evaluate(() => [localStorage.length, sessionStorage.length, document.cookie, location.href].join(" "));
  assert.ok(kept.startsWith("0 0  http://") && !kept.includes(secret.trim()), kept);
  await page.reload();
  await dialog.getByText("This server wants a token.").waitFor();
});

test("behind TLS the page is the same, over HTTP/2", async (t) => {
  const pem = (name) => path.join(import.meta.dirname, "../fixtures/tls", name);
  const settings = { DENOISED__SERVER__TLS_CERTIFICATE: pem("first.pem"), DENOISED__SERVER__TLS_KEY: pem("first.key") };
  const secured = await serve(settings);
  t.after(() => secured.stop());
  const page = await open(t, secured.url, { ignoreHTTPSErrors: true });
  await fill(page, "The[[4]].");
  await denoised(page);
  const protocols = await page.evaluate(() => performance.getEntriesByType("resource").map((entry) => entry.nextHopProtocol));
  assert.ok(protocols.length > 3 && protocols.every((protocol) => protocol === "h2"), protocols.join(" "));
});

test("samples are ranked and candidates chosen", async (t) => {
  const page = await open(t, server.url);
  await fill(page, "And the king[[1]] to the people.", { samples: 4, seed: 2 });
  await denoised(page);
  assert.equal(await page.locator(".canvas").count(), 4);
  await button(page, "Rank by likelihood").click();
  await page.locator(".canvas .facts", { hasText: "log-likelihood" }).first().waitFor();
  const ranked = await page.locator(".canvas .facts").allTextContents();
  const worth = ranked.map((facts) => Number(/log-likelihood -([\d.]+) nats/.exec(facts)[1]));
  assert.deepEqual(worth, worth.toSorted((a, b) => a - b));

  await page.getByText("Candidates for a gap").click();
  await page.getByLabel(/^One a line/).fill("said\nelephant");
  await button(page, "Choose").click();
  const rows = page.locator(".candidates tbody tr");
  await rows.first().waitFor();
  assert.match(await rows.nth(0).textContent(), /^said 9\d\.\d %|^said 100\.0 %/);
  assert.match(await rows.nth(1).textContent(), /^elephant \d\.\d %/);
});

test("what cannot be copied is said", async (t) => {
  const page = await open(t, server.url);
  await fill(page, "The[[4]].");
  await denoised(page);
  await page.evaluate(() => Object.defineProperty(navigator, "clipboard", { value: undefined }));
  await button(page, "Copy").click();
  await page.locator(".problem", { hasText: "does not let this page copy" }).waitFor();
});

test("mistakes are told in words that name them", async (t) => {
  const page = await open(t, server.url);
  for (const [template, fields, words] of [
    ["The[[8", {}, "has no “]]”"],
    ["The[[x]]", {}, "[[x]]"],
    ["The[[4]]", { steps: "many" }, "The number of steps is “many”"],
    ["The[[4]]", { steps: "100000" }, "steps"],
    ["The[[4000]]", { steps: "" }, "positions"],
  ]) {
    await fill(page, template, fields);
    await button(page, "Denoise").click();
    await page.locator(".problem", { hasText: words }).first().waitFor();
  }
});

test("nothing is inaccessible, in both themes and on a phone", async (t) => {
  for (const colorScheme of ["light", "dark"]) {
    for (const width of [1280, 360]) {
      const page = await open(t, server.url, { colorScheme, viewport: { width, height: 900 } });
      await fill(page, "And the king said to[[6]], and they went up to[[8]] in the morning.", { samples: 2, seed: 4 });
      await denoised(page);
      await page.getByText("Candidates for a gap").click();
      await button(page, "Choose").click();
      await page.locator(".candidates tbody tr").first().waitFor();
      await page.getByRole("listbox").first().focus();
      for (const key of ["ArrowRight", "ArrowRight", "Shift+ArrowRight"]) await page.keyboard.press(key);
      await check(page, `${colorScheme}-${width}`);
      await page.locator(".editor details").evaluate((details) => (details.open = false));
      await page.getByLabel("Colours tell").selectOption("time");
      await scrubTo(page, "Home");
      for (let times = 0; times < 60; times += 1) await page.keyboard.press("ArrowRight");
      await check(page, `${colorScheme}-${width}-early`);
    }
  }
});

/** Has axe look at the page, and nothing may be wider than it. */
async function check(page, name) {
  if (screenshots) await page.screenshot({ path: path.join(screenshots, `${name}.png`), fullPage: true });
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => window.axe.run(document, { runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"] }));
  assert.deepEqual(violations.map(({ id, nodes }) => `${id}: ${nodes.map(({ html }) => html).join(" ")}`), [], name);
  const [wide, width] = await page.evaluate(() => [document.documentElement.scrollWidth, innerWidth]);
  assert.ok(wide <= width, `${name}: ${wide} pixels wide`);
}
