// What a stream tells of one canvas: every state that it was seen in.
import { create } from "@bufbuild/protobuf";
import type { CanvasResult, Frame } from "./made/denoised/v1/event_pb";
import { FinishReason, FrameSchema, KeyframeSchema } from "./made/denoised/v1/event_pb";

/** A canvas after some of its steps. */
export interface State {
  step: number;
  total: number;
  t: number;
  sigma: number;
  nfe: number;
  tokens: number[];
  masked: boolean[];
  clamped: boolean[];
  /** Steps after which each position got its present token; 0 where it has not changed. */
  committedAt: number[];
  /** Log-probability of each token when it was drawn, in nats. */
  logProbabilities: number[];
}

/** The states of a canvas, oldest first, and its result once it is there. */
export interface Canvas {
  states: State[];
  /** The mask token, once a masked position was seen. */
  mask?: number;
  result?: { text: string; early: boolean };
}

/** Positions of all states of a canvas together that are kept; beyond that every other state is forgotten. */
const MAX_KEPT = 1_000_000;

const bit = (bits: Uint8Array, at: number) => (((bits[at >> 3] ?? 0) >> (at & 7)) & 1) === 1;

/** The canvas once `frame` has come. */
export function withFrame(canvas: Canvas, frame: Frame): Canvas {
  let { mask } = canvas;
  const { step, total, t, sigma, nfe } = frame;
  const before = canvas.states.at(-1);
  let state: State;
  if (frame.content.case === "keyframe") {
    const { tokens, masked, clamped, committedAt, logProbabilities } = frame.content.value;
    state = {
      step, total, t, sigma, nfe, tokens, committedAt, logProbabilities,
      masked: tokens.map((_, at) => bit(masked, at)),
      clamped: tokens.map((_, at) => bit(clamped, at)),
    };
    mask ??= tokens[state.masked.indexOf(true)];
  } else if (frame.content.case === "delta" && before) {
    const delta = frame.content.value;
    state = {
      step, total, t, sigma, nfe,
      tokens: [...before.tokens], masked: [...before.masked], clamped: before.clamped,
      committedAt: [...before.committedAt], logProbabilities: [...before.logProbabilities],
    };
    delta.positions.forEach((position, at) => {
      const token = delta.tokens[at] ?? 0;
      state.tokens[position] = token;
      state.masked[position] = token === mask;
      state.committedAt[position] = delta.committedAt[at] ?? 0;
      state.logProbabilities[position] = delta.logProbabilities[at] ?? 0;
    });
  } else {
    return canvas;
  }
  const states = canvas.states.filter((known) => known.step < step);
  states.push(state);
  const kept = states.length * state.tokens.length;
  return { ...canvas, mask, states: kept > MAX_KEPT ? states.filter((_, at) => at % 2 === 0 || at === states.length - 1) : states };
}

/** The canvas once its result has come: the last state is whole. */
export function withResult(canvas: Canvas, result: CanvasResult): Canvas {
  const early = result.finishReason === FinishReason.DEADLINE;
  const last = canvas.states.at(-1);
  const states = [...canvas.states];
  if (last && last.masked.some(Boolean)) {
    const { tokens, committedAt, logProbabilities, nfe } = result;
    states.push({ ...last, step: last.total, t: 0, sigma: 0, nfe, tokens, committedAt, logProbabilities, masked: tokens.map(() => false) });
  }
  return { ...canvas, states, result: { text: result.text ?? "", early } };
}

/** The newest state that is no later than `step`. */
export function stateAt(canvas: Canvas, step: number): State | undefined {
  return canvas.states.findLast((state) => state.step <= step) ?? canvas.states[0];
}

function bits(flags: boolean[]): Uint8Array {
  const bytes = new Uint8Array(Math.ceil(flags.length / 8));
  flags.forEach((flag, at) => {
    if (flag) bytes[at >> 3] = (bytes[at >> 3] ?? 0) | (1 << (at & 7));
  });
  return bytes;
}

/** The frame that a server goes on from with `state`. */
export function frameOf(canvas: number, state: State): Frame {
  const { step, total, t, sigma, nfe, tokens, committedAt, logProbabilities } = state;
  const keyframe = create(KeyframeSchema, {
    tokens, committedAt, logProbabilities, masked: bits(state.masked), clamped: bits(state.clamped),
  });
  return create(FrameSchema, {
    canvas, step, total, t, sigma, nfe, masked: state.masked.filter(Boolean).length,
    content: { case: "keyframe", value: keyframe },
  });
}
