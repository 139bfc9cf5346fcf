// What is asked: the form's fields, and what they are in a link and in a request.
import { signal } from "@preact/signals";
import type { MessageInitShape } from "@bufbuild/protobuf";
import type { Accepted } from "./made/denoised/v1/event_pb";
import type { ModelReference } from "./made/denoised/v1/model_reference_pb";
import { OnDeadline } from "./made/denoised/v1/deadline_pb";
import type { Sampling, SamplingSchema } from "./made/denoised/v1/sampling_pb";
import type { GenerateRequestSchema, InfillRequestSchema } from "./made/denoised/v1/diffusion_service_pb";
import { FramePolicy_Text, FramePolicy_When } from "./made/denoised/v1/sampling_pb";
import { TemplateError, parse } from "./template";

/** The fields as they are typed; empty for what is left to the model and the server. */
export interface Settings {
  template: string;
  model: string;
  length: string;
  sampler: string;
  steps: string;
  temperature: string;
  top_p: string;
  seed: string;
  samples: string;
  start_time: string;
  deadline_ms: string;
}

const EMPTY: Settings = {
  template: "", model: "", length: "", sampler: "", steps: "", temperature: "", top_p: "", seed: "", samples: "",
  start_time: "", deadline_ms: "",
};
const FIRST = "And the king said to[[6]], and they went up to[[8]] in the morning.";
const NAMES = Object.keys(EMPTY) as (keyof Settings)[];

/** Samplers by the names that the proto has for them. */
export const SAMPLERS = {
  tweedie: "tweedie",
  euler: "euler",
  first_hitting: "firstHitting",
  confidence: "confidence",
  entropy_bounded: "entropyBounded",
  remask: "remask",
  theta_trapezoidal: "thetaTrapezoidal",
  probability_margin: "probabilityMargin",
} as const;

/** The settings that a link has after its `#`, and whether it has any. */
export function fromLink(hash: string): { settings: Settings; given: boolean } {
  const said = new URLSearchParams(hash.replace(/^#/, ""));
  const settings = { ...EMPTY };
  for (const name of NAMES) settings[name] = said.get(name) ?? "";
  const given = said.has("template");
  return { settings: given ? settings : { ...settings, template: FIRST }, given };
}

/** What a link to `settings` has after its `#`. */
export function toLink(settings: Settings): string {
  const said = NAMES.filter((name) => settings[name] !== "" || name === "template").map((name) => [name, settings[name]]);
  return `#${new URLSearchParams(said)}`;
}

/** The form as it stands. */
export const settings = signal<Settings>(fromLink(location.hash).settings);

/** Changes some fields of the form. */
export function change(changed: Partial<Settings>) {
  settings.value = { ...settings.value, ...changed };
}

/** The request as the server understood it, so that its link gives the same text again. */
export function resolved(asked: Settings, accepted: Accepted): Settings {
  const sampling = accepted.sampling;
  const known = Object.entries(SAMPLERS).find(([, field]) => field === sampling?.sampler.case);
  const number = (value: number | bigint | undefined) => (value === undefined ? "" : String(value));
  const hasDraft = accepted.template.some(({ part }) => part.case === "draft");
  return {
    ...asked,
    model: accepted.model ? nameOf(accepted.model) : asked.model,
    length: isPrompt(asked.template) ? String(accepted.length) : "",
    sampler: known?.[0] ?? "",
    steps: number(sampling?.steps),
    temperature: number(sampling?.temperature),
    top_p: number(sampling?.topP),
    seed: number(sampling?.seed),
    samples: number(sampling?.numSamples),
    start_time: hasDraft ? number(sampling?.startTime) : "",
  };
}

/** A model as `NAME@VERSION`. */
export function nameOf({ name, version }: Pick<ModelReference, "name" | "version">): string {
  return `${name}@${version}`;
}

/** A model that is named as `NAME` or `NAME@VERSION`. */
export function reference(text: string) {
  if (text === "") return undefined;
  const [, name = text, version = "0"] = /^(.*)@(\d+)$/.exec(text) ?? [];
  return { name, version: BigInt(version) };
}

/** Whether a template is a prompt, with nothing but text that is to be continued. */
function isPrompt(template: string): boolean {
  try {
    return parse(template).every((part) => part.kind === "text");
  } catch {
    return false;
  }
}

/** A field that holds no number. */
export class SettingError extends Error {}

function numberIn(settings: Settings, name: keyof Settings, label: string): number | undefined {
  const text = settings[name].trim();
  if (text === "") return undefined;
  const number = Number(text);
  if (!Number.isFinite(number)) throw new SettingError(`${label} is “${text}”, which is no number.`);
  return number;
}

function wholeIn(settings: Settings, name: keyof Settings, label: string): number | undefined {
  const number = numberIn(settings, name, label);
  if (number !== undefined && (!Number.isInteger(number) || number < 0 || number > 0xffff_ffff)) {
    throw new SettingError(`${label} is ${number}, which is no whole number that can be asked for.`);
  }
  return number;
}

function sampling(settings: Settings): MessageInitShape<typeof SamplingSchema> {
  const seed = settings.seed.trim();
  if (!/^\d*$/.test(seed)) throw new SettingError(`The seed is “${seed}”, which is no whole number.`);
  const field = SAMPLERS[settings.sampler as keyof typeof SAMPLERS];
  return {
    sampler: field ? ({ case: field, value: {} } as Sampling["sampler"]) : { case: undefined },
    steps: wholeIn(settings, "steps", "The number of steps"),
    seed: seed === "" ? undefined : BigInt(seed),
    temperature: numberIn(settings, "temperature", "The temperature"),
    topP: numberIn(settings, "top_p", "Top-p"),
    numSamples: wholeIn(settings, "samples", "The number of samples"),
    startTime: numberIn(settings, "start_time", "How much is noised"),
  };
}

/** Every state, as fast as it comes; its text is put together here. */
export const FRAMES = { when: FramePolicy_When.ON_CHANGE, minIntervalMs: 0, text: FramePolicy_Text.NONE };

/** The request that the form stands for. */
export function request(
  settings: Settings,
):
  | { method: "generate"; request: MessageInitShape<typeof GenerateRequestSchema> }
  | { method: "infill"; request: MessageInitShape<typeof InfillRequestSchema> } {
  const parts = parse(settings.template);
  const ms = wholeIn(settings, "deadline_ms", "The deadline");
  const common = {
    model: reference(settings.model),
    sampling: sampling(settings),
    frames: FRAMES,
    deadline: ms === undefined ? undefined : { ms: BigInt(ms), onDeadline: OnDeadline.FINISH_EARLY },
  };
  if (parts.every((part) => part.kind === "text")) {
    const prompt = parts.map((part) => part.text).join("");
    const length = wholeIn(settings, "length", "The length");
    return { method: "generate", request: { ...common, promptAs: { case: "prompt", value: prompt }, length } };
  }
  const sets: string[][] = [];
  const nameOfSet = (allowed: string[]) => {
    if (allowed.length === 0) return undefined;
    let at = sets.findIndex((set) => JSON.stringify(set) === JSON.stringify(allowed));
    if (at < 0) at = sets.push(allowed) - 1;
    return String(at + 1);
  };
  const template = parts.map((part) => {
    switch (part.kind) {
      case "text":
        return { part: { case: "text" as const, value: part.text } };
      case "gap":
        return { part: { case: "gap" as const, value: { positions: part.positions, allowed: nameOfSet(part.allowed) } } };
      case "draft":
        return { part: { case: "draft" as const, value: { content: { case: "text" as const, value: part.text } } } };
    }
  });
  const tokenSets = sets.map((texts, at) => ({ name: String(at + 1), texts }));
  return { method: "infill", request: { ...common, template, tokenSets } };
}

/** Whether `error` is about what was typed. */
export function isTyped(error: unknown): error is Error {
  return error instanceof TemplateError || error instanceof SettingError;
}
