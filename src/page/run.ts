// One run: a request, what its stream tells, and how it is stopped and gone on with.
import type { MessageInitShape } from "@bufbuild/protobuf";
import { computed, signal } from "@preact/signals";
import { diffusion, isGone, isStopped, told } from "./api";
import type { Canvas } from "./canvas";
import { frameOf, stateAt, withFrame, withResult } from "./canvas";
import type { GenerateRequestSchema, InfillRequestSchema } from "./made/denoised/v1/diffusion_service_pb";
import type { Accepted, Event } from "./made/denoised/v1/event_pb";
import type { Model } from "./made/denoised/v1/model_service_pb";
import { Pieces } from "./pieces";
import { FRAMES } from "./settings";

/** How a run stands. */
export type Phase = "running" | "waiting" | "stopped" | "done" | "failed";

/** What is asked of the server. */
export type Asked =
  | { method: "generate"; request: MessageInitShape<typeof GenerateRequestSchema> }
  | { method: "infill"; request: MessageInitShape<typeof InfillRequestSchema> };

/** Times that a stream is begun again without anything new, and the pauses before it, in milliseconds. */
const MAX_TRIES = 8;
const pause = (tries: number) => Math.min(250 * 2 ** tries, 5000);
/** Milliseconds between two looks of the page at what has come. */
const LOOK = 16;

/** A request and its canvases. */
export class Run {
  readonly phase = signal<Phase>("running");
  readonly message = signal("");
  readonly accepted = signal<Accepted | undefined>(undefined);
  readonly canvases = signal<Canvas[]>([]);
  readonly pieces = signal(new Pieces(undefined));
  /** The newest step that any canvas was seen at, and the last one of all. */
  readonly newest = computed(() => Math.max(0, ...this.canvases.value.map(({ states }) => states.at(-1)?.step ?? 0)));
  readonly total = computed(() => this.accepted.value?.total ?? 0);
  readonly isRunning = computed(() => this.phase.value === "running" || this.phase.value === "waiting");

  #asked: Asked;
  #models: Model[];
  #abort = new AbortController();
  #come: Canvas[] = [];
  #look: ReturnType<typeof setTimeout> | undefined;

  constructor(asked: Asked, models: Model[]) {
    this.#asked = asked;
    this.#models = models;
  }

  /** Runs until the end, and begins again where the server was gone in between. */
  async start() {
    for (let tries = 0; ; ) {
      const known = this.#seen();
      try {
        await this.#stream();
        this.#show();
        this.phase.value = "done";
        return;
      } catch (error) {
        this.#show();
        if (this.#abort.signal.aborted || isStopped(error)) {
          this.phase.value = "stopped";
          return;
        }
        tries = this.#seen() > known ? 1 : tries + 1;
        if (!isGone(error) || tries > MAX_TRIES) {
          this.message.value = told(error);
          this.phase.value = "failed";
          return;
        }
        this.message.value = `${told(error)} Trying again (${tries} of ${MAX_TRIES}) …`;
        this.phase.value = "waiting";
        await this.#wait(pause(tries));
        this.#asked = this.#rest();
      }
    }
  }

  /** How many states have been seen. */
  #seen(): number {
    return this.#come.reduce((sum, { states }) => sum + states.length, 0);
  }

  /** Ends the run; what stands there stays. */
  stop() {
    this.#abort.abort();
  }

  /** A run that goes on from what stood there after `step` steps: it ends as this one would. */
  goOn(step: number): Run | undefined {
    const accepted = this.accepted.value;
    if (!accepted) return undefined;
    const next = new Run(this.#asked, this.#models);
    next.#come = this.#come.map((canvas) => {
      const states = canvas.states.filter((state) => state.step <= step);
      const ended = canvas.result && states.at(-1)?.step === canvas.states.at(-1)?.step;
      return ended ? canvas : { states, mask: canvas.mask };
    });
    next.accepted.value = accepted;
    next.pieces.value = this.pieces.value;
    next.#asked = next.#rest();
    next.#show();
    return next;
  }

  /** The request for what is still to come. */
  #rest(): Asked {
    const accepted = this.accepted.value;
    if (!accepted) return this.#asked;
    const isDone = (canvas: Canvas) => canvas.result !== undefined;
    const frames = this.#come.flatMap((canvas, at) => {
      const state = stateAt(canvas, Infinity);
      return isDone(canvas) || !state ? [] : [frameOf(at, state)];
    });
    const finished = this.#come.flatMap((canvas, at) => (isDone(canvas) ? [at] : []));
    const request = { resume: { accepted, frames, finished }, frames: FRAMES };
    return { method: this.#asked.method, request };
  }

  async #stream() {
    const { signal } = this.#abort;
    const responses =
      this.#asked.method === "generate"
        ? diffusion.generate(this.#asked.request, { signal })
        : diffusion.infill(this.#asked.request, { signal });
    for await (const { event } of responses) if (event) this.#take(event.event);
  }

  #take(event: Event["event"]) {
    switch (event.case) {
      case "accepted": {
        const accepted = event.value;
        this.accepted.value = accepted;
        this.pieces.value = new Pieces(accepted.model);
        const samples = accepted.sampling?.numSamples ?? 1;
        this.#come = Array.from({ length: samples }, (_, at) => this.#come[at] ?? { states: [] });
        this.phase.value = "running";
        this.message.value = "";
        break;
      }
      case "frame": {
        const { canvas } = event.value;
        this.#put(canvas, withFrame(this.#come[canvas] ?? { states: [] }, event.value));
        break;
      }
      case "result": {
        const { canvas } = event.value;
        this.#put(canvas, withResult(this.#come[canvas] ?? { states: [] }, event.value));
        break;
      }
      case undefined:
        break;
    }
  }

  /** The model that answers. */
  model(): Model | undefined {
    const named = this.accepted.value?.model;
    return this.#models.find(({ name, version }) => name === named?.name && version === named.version);
  }

  #put(at: number, canvas: Canvas) {
    this.#come[at] = canvas;
    this.#look ??= setTimeout(() => this.#show(), LOOK);
  }

  #show() {
    clearTimeout(this.#look);
    this.#look = undefined;
    this.canvases.value = [...this.#come];
    this.pieces.value.want(this.#come.flatMap(({ states }) => states.at(-1)?.tokens ?? []));
  }

  async #wait(ms: number) {
    const { signal } = this.#abort;
    await new Promise<void>((done) => {
      const timer = setTimeout(done, ms);
      signal.addEventListener("abort", () => (clearTimeout(timer), done()), { once: true });
    });
  }
}
