// Which step is shown: the newest one, or one on the way there.
import { effect, signal } from "@preact/signals";
import type { Run } from "./run";

/** Seconds that a whole run is shown in; 0 for as it comes. */
export const PACES = [0, 3, 8, 20];

const isStill = matchMedia("(prefers-reduced-motion: reduce)").matches;

/** The run on the page. */
export const run = signal<Run | undefined>(undefined);
export const pace = signal(isStill ? 0 : 8);
export const isPlaying = signal(false);
/** The step that is shown. */
export const shown = signal(0);

let exact = 0;
let last = 0;

function tick(now: number) {
  const current = run.value;
  if (!isPlaying.value || !current) return;
  const newest = current.newest.value;
  const total = current.total.value;
  const passed = (now - last) / 1000;
  last = now;
  exact = pace.value === 0 ? newest : Math.min(newest, exact + (passed * total) / pace.value);
  shown.value = Math.floor(exact);
  if (!current.isRunning.value && shown.value >= newest) isPlaying.value = false;
  else requestAnimationFrame(tick);
}

effect(() => {
  if (!isPlaying.value) return;
  last = performance.now();
  requestAnimationFrame(tick);
});

/** Shows `step` and stays there. */
export function scrub(step: number) {
  isPlaying.value = false;
  exact = step;
  shown.value = step;
}

/** Plays on from `step`. */
export function play(step: number) {
  scrub(step);
  isPlaying.value = true;
}

/** Shows `next` from `step` on, and starts it. */
export function follow(next: Run, step: number) {
  run.value?.stop();
  run.value = next;
  play(step);
  void next.start();
}
