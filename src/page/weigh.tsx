// What texts are worth: samples ranked by `Score`, and candidates for a gap by `Choose`.
import { useSignal } from "@preact/signals";
import { diffusion, told } from "./api";
import { stateAt } from "./canvas";
import type { Canvas } from "./canvas";
import { Graph } from "./made/denoised/v1/model_service_pb";
import { gapsOf, textOf } from "./parts";
import type { Run } from "./run";

/** Minus the log-likelihood of what each sample filled, given the rest; in nats. */
export async function rank(run: Run): Promise<number[]> {
  const texts = run.canvases.value.map((canvas) => {
    const state = stateAt(canvas, Infinity);
    const parts: { content: { content: { case: "tokens"; value: { ids: number[] } } }; context: boolean }[] = [];
    state?.tokens.forEach((token, at) => {
      const context = state.clamped[at] ?? false;
      const last = parts.at(-1);
      if (last?.context === context) last.content.content.value.ids.push(token);
      else parts.push({ content: { content: { case: "tokens", value: { ids: [token] } } }, context });
    });
    return { parts };
  });
  const likelihood =
    run.model()?.graph === Graph.UNIFORM
      ? ({ likelihood: { case: "bound", value: {} } } as const)
      : ({ likelihood: { case: "exact", value: {} } } as const);
  const nats = texts.map(() => NaN);
  for await (const { event } of diffusion.score({ model: run.accepted.value?.model, texts, likelihood })) {
    if (event.case === "score") nats[event.value.text] = event.value.nats;
  }
  return nats;
}

/** Candidates for a gap, with their probabilities. */
export function Candidates({ run, canvases }: { run: Run; canvases: Canvas[] }) {
  const gap = useSignal(0);
  const typed = useSignal<string | undefined>(undefined);
  const chosen = useSignal<{ text: string; probability: number }[]>([]);
  const message = useSignal("");
  const pieces = run.pieces.value.known.value;
  const states = canvases.flatMap((canvas) => stateAt(canvas, Infinity) ?? []);
  const [first] = states;
  const gaps = first ? gapsOf(first) : [];
  const range = gaps[gap.value];
  if (!first || !range) return null;
  const fillings = states.map((state) => textOf(state, pieces, range.from, range.to));
  const candidates = typed.value ?? [...new Set(fillings.map((text) => text.trim()).filter((text) => text !== ""))].join("\n");

  async function choose() {
    if (!first || !range) return;
    message.value = "";
    const texts = [...new Set(candidates.split("\n").map((text) => text.trim()).filter((text) => text !== ""))];
    if (texts.length < 2) {
      message.value = "Write at least two candidates, one a line.";
      return;
    }
    // A space before the candidate is its own to begin with.
    const space = fillings[0]?.startsWith(" ") ? " " : "";
    const text = (value: string) => ({ content: { case: "text" as const, value } });
    try {
      const answer = await diffusion.choose({
        model: run.accepted.value?.model,
        before: text(textOf(first, pieces, 0, range.from) + space),
        after: text(textOf(first, pieces, range.to)),
        candidates: texts.map(text),
      });
      chosen.value = answer.candidates
        .map(({ probability }, at) => ({ text: texts[at] ?? "", probability }))
        .sort((a, b) => b.probability - a.probability);
    } catch (error) {
      message.value = told(error);
    }
  }

  return (
    <details class="candidates">
      <summary>Candidates for a gap</summary>
      <div class="row">
        {gaps.length > 1 && (
          <label>
            Gap
            <select
              value={gap.value}
              onChange={(event) => {
                gap.value = Number(event.currentTarget.value);
                typed.value = undefined;
                chosen.value = [];
              }}
            >
              {gaps.map((_, at) => (
                <option value={at}>{at + 1}</option>
              ))}
            </select>
          </label>
        )}
      </div>
      <label>
        One a line; the rest is as in the first sample
        <textarea rows={4} value={candidates} onInput={(event) => (typed.value = event.currentTarget.value)} />
      </label>
      <div class="row">
        <button type="button" onClick={() => void choose()}>
          Choose
        </button>
      </div>
      <div role="status">{message.value}</div>
      {chosen.value.length > 0 && (
        <table>
          <thead>
            <tr>
              <th scope="col">Candidate</th>
              <th scope="col">Probability</th>
            </tr>
          </thead>
          <tbody>
            {chosen.value.map(({ text, probability }) => (
              <tr>
                <td>{text}</td>
                <td>
                  <meter value={probability} aria-label={`Probability of ${text}`} /> {(100 * probability).toFixed(1)} %
                </td>
              </tr>
            ))}
          </tbody>
        </table>
      )}
    </details>
  );
}
